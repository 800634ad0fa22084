"""Results of studies as files, and the page that shows them."""
