"""What `btm expand` does: what has arrived in the inbox or the plan, to experts, merged where they may be."""
