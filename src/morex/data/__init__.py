"""Text to windows of tokens: `formats`, `sources`, `split`, `tokenizer`, `prepare` (token files), `loader` (batches).

`prepare.prepare` is the way in: it returns the tokenizer and the two splits; `loader.Loader` draws training windows,
`loader.held_out_windows` goes through the held-out split once, `inspect.describe` says what a corpus holds.
"""
