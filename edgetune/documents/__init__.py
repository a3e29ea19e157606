"""Notes and chats: folders become Documents in a stable order, each text once, with an account of what was skipped."""
