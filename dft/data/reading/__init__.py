"""Read rows from files, folders, archives and hub datasets."""
