"""Pictures, tables and the page of one or several runs."""
