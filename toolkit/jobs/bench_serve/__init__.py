"""Load tests of any server that speaks OpenAI's API: what is asked, how it is sent, what is measured and shown."""
