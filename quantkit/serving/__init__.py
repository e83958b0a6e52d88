"""Several requests at once: scheduler, chat, HTTP."""
