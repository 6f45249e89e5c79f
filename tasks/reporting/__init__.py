"""Telling people: summaries, the HTML report, sample previews and the dry run."""
