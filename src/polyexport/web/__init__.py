"""What is made for the web: Node, which runs it here, and the page that runs it in a browser."""
