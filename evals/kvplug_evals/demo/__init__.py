"""``kvplug demo``: one conversation, one server a policy, side by side."""
