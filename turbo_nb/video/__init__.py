"""Images in; mp4 files, previews and galleries out."""
