"""`nanovllm serve`: a model behind OpenAI's HTTP API, by starlette and uvicorn (the extra `serve`).

    command     the flags, and what they may say            serving     socket, signals, draining, the process's life
    app         which path is answered by what              connection  slow, stalled and malformed clients
    guard       Host, Origin and key of each request        log         one line a request
    body        reading JSON under limits                   errors      OpenAI's shape of an error
    asked       a body -> prompts and parameters            parameters  which parameters mean what here
    admission   how many answers at once                    answering   a request from its body to the last byte
    pieces      the engine's pieces, of several prompts     shapes, logprobs   what clients get
    page        the chat page

The event loop does everything but the model, which a thread of its own drives; a client that leaves is heard at once
and its answers are aborted.
"""
