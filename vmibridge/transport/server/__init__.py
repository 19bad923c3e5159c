"""The end that runs the handlers, of one VM (`single`) or of many (`server`)."""
