"""Bodies of requests for a server, most of them malformed."""

from hypothesis import strategies as st

NAMES = (
    "prompt messages model max_tokens n stop stream stream_options logprobs seed "
    "top_logprobs temperature top_k top_p min_p logit_bias banned_tokens min_tokens "
    "echo response_format tools tool_choice user frequency_penalty x"
).split()
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "type", "text", "1", "x"]), inner
        )
    ),
    max_leaves=8,
)
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)
