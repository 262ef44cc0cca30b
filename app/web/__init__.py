"""The HTTP API: requests are decoded and checked, answers encoded."""
