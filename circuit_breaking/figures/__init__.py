"""Every picture, drawn from result files only.

First file to read: `style`."""
