"""Helpers that several test modules use; no test stands here."""
