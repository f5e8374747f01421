"""Data modules for every objective: source code of installed Python libraries, or any dataset (hub or local)."""
