"""Which block type each tensor gets, and which codes its weights get."""
