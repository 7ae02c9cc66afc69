"""Data sets as numpy arrays, and how one of them is shared out among workers."""
