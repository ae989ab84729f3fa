"""The Model Registry's REST API over SQLite, for a laptop."""
