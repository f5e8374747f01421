"""Data for every objective: the text of installed Python libraries, or any dataset from the hub or the disk."""
