"""The study: runs that belong together, and the report that shows them."""
