"""What browsers see: the front page, the documentation, the playgrounds, and what they may do."""
