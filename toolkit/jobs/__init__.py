"""Jobs that use every part: evaluating, inspecting, running recipes, the quickstart."""
