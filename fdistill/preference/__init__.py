"""Models that learnt which images people prefer for a prompt; training and evaluation compute the same scores."""
