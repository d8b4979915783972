"""The command `polyexport`: in `app` the list of its commands, which have files by what they work on."""

from polyexport.cli.app import app as app
