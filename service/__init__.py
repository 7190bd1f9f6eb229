"""HTTP: settings, routes, the door, errors, pages. Knows chains by name, not by content, and no torch."""
