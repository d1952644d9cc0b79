"""Every line that changes somebody else's library, one file each, each with its guard and its upstream issue."""
