"""Text to people: a conversation on the terminal, several requests at once over HTTP."""
