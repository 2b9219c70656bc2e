"""What a model reads beside ids: attributes of users and items, events, times, places in a list. Needs numpy alone."""
