"""The model over HTTP, in OpenAI's shapes; see docs/serving.md. Needs the extra [serve]."""
