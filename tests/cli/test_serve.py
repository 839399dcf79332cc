import socket

import pytest

from keras_openllama.cli.serve import (
    API_KEY_VARIABLE,
    adapters_by_name,
    allowed_hosts,
    api_keys,
    main,
    model_name,
    parse_arguments,
)

pytestmark = pytest.mark.backend_free


def parse(*arguments):
    return parse_arguments(arguments, "serve")


def test_serve_listens_on_the_loopback_interface_by_default():
    options = parse()
    assert (options.host, options.port) == ("127.0.0.1", 8000)
    assert allowed_hosts(options) == ("localhost", "127.0.0.1", "::1")


def test_serve_allows_all_hosts_on_other_interfaces_unless_some_are_named():
    assert allowed_hosts(parse("--host", "0.0.0.0")) == ("*",)
    named = parse("--host", "0.0.0.0", "--allowed-host", "a.example")
    assert allowed_hosts(named) == ("a.example",)


def test_api_keys_are_taken_from_flags_and_the_environment():
    assert api_keys(None, {}) == ()
    assert api_keys(["a", "b"], {API_KEY_VARIABLE: "c"}) == ("a", "b", "c")
    with pytest.raises(ValueError, match="printable ASCII"):
        api_keys(["schlüssel"], {})


@pytest.mark.parametrize(
    "preset, name",
    [("nano", "nano"), ("runs/mine/", "mine"), ("hf://user/repo", "repo")],
)
def test_the_last_part_of_the_preset_is_the_name_of_the_model(preset, name):
    assert model_name(preset) == name


def test_adapters_have_a_name_or_are_for_all_requests():
    flags = ["--adapters", "a=x=y", "--adapters", "b.1=hf://user/b"]
    expected = {"a": "x=y", "b.1": "hf://user/b"}
    assert adapters_by_name(parse(*flags).adapters) == expected
    assert adapters_by_name(["./a=x"]) == {None: "./a=x"}
    assert adapters_by_name(None) == {}


@pytest.mark.parametrize(
    "values, message",
    [
        (["a=x", "a=y"], "different name .* Received: a=y"),
        (["x", "a=y"], "for all requests"),
        (["x", "y"], "different name"),
    ],
)
def test_adapters_for_all_requests_are_the_only_ones(values, message):
    with pytest.raises(ValueError, match=message):
        adapters_by_name(values)


def test_serve_refuses_adapters_that_do_not_exist(capsys):
    assert main(["--adapters", "law=missing"], "serve") == 2
    assert "--adapters: the directory missing does not exist" in capsys.readouterr().err


def test_serve_refuses_a_port_that_is_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--preset", "nano", "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"--port={port}" in error and "Choose others" in error


@pytest.mark.parametrize("value", ["-1", "65536", "http"])
def test_serve_refuses_what_is_not_a_port(value, capsys):
    with pytest.raises(SystemExit):
        parse("--port", value)
    assert "--port must be an integer from 0 to 65535" in capsys.readouterr().err
