"""Items that follow each other in histories, and soft targets made of them."""
