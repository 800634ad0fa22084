"""A forest behind OpenAI's completions API: what is served, an engine for many
callers, and the HTTP application. Knows no Ray."""
