"""Lightning callbacks: they decide *when* to act; the functions in the rest of the package decide *what* to do."""
