"""Pictures, tables and the HTML page of one or more runs."""
