"""From vectors to lists: interests, merging, indexes, and the folders of exports and lists."""
