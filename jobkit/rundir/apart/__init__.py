"""Steps of several processes that share no disk: each home has one part, and the URL has all of them."""
