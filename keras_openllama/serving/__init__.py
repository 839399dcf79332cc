"""An HTTP server with the API of OpenAI, which `keras-openllama serve` runs."""
