"""Uvicorn, and what it leaves open: connections, disconnects, and how the service stops."""
