"""Images in, mp4 files out, previews and galleries."""
