"""What a run's history says: a table for the terminal, a picture. Needs the extra `apoptorch[report]`."""
