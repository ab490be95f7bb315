"""Weight files: found, downloaded, recognised, converted."""
