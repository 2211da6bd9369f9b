"""The scripts that made the reference pipelines: data, networks, loops and judges. Not part of the wheel."""
