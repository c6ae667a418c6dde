"""Docker's options of a container, as JSON gives them. A name that Docker does not know is refused.

Docker itself ignores such a name. Its API calls a mount's option ``ReadOnly``, so that with
``{"read_only": true}`` the folder would be writable. Here both spellings are understood. The names
are read from the Docker SDK's own types; a list stands here only where the SDK has no type.
No message has a value, because values may be secrets.
"""

import inspect
import json
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import docker
from docker.constants import DEFAULT_DOCKER_API_VERSION as VERSION
from docker.errors import DockerException, InvalidArgument, InvalidVersion
from docker.types import (
    ContainerConfig,
    DeviceRequest,
    DriverConfig,
    EndpointConfig,
    Healthcheck,
    HostConfig,
    LogConfig,
    Mount,
    NetworkingConfig,
    Ulimit,
)
from docker.utils import convert_port_bindings, convert_volume_binds, parse_devices

from flows.messages import abbreviated, kind, nearest, plain


def environment_strings(environment: Mapping[str, Any] | list[str]) -> dict[str, str | None]:
    """An environment as Docker takes it: true, false and numbers as JSON writes them.

    In a list, ``NAME`` alone has the value that the flow's process has, as with
    ``docker run --env``. In a mapping, None stays: Docker removes the variable that the image sets.
    Raises InvalidArgument on a name or a value that Docker cannot hold, or that the flow does not
    have.
    """
    if isinstance(environment, list):
        environment = _listed_environment(environment)
    if not isinstance(environment, Mapping):
        raise InvalidArgument(f"environment is {kind(environment)}")
    return {name: _variable(name, value) for name, value in environment.items()}


def _variable(name: Any, value: Any) -> str | None:
    """The value of a variable as Docker takes it. Raises InvalidArgument if it takes none."""
    shown = _shown(name)
    if not isinstance(name, str) or not name or "=" in name or "\0" in name:
        needed = "a name is text, not empty, without '=' or NUL"
        raise InvalidArgument(f"environment has the name {shown}: {needed}")
    if "\0" in str(value):
        raise InvalidArgument(f"environment[{shown}] holds NUL")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (int, float)):
        return json.dumps(value)
    needed = "text, a number, true, false or null"
    raise InvalidArgument(f"environment[{shown}] is {kind(value)}, not {needed}")


def _listed_environment(environment: list[Any]) -> dict[str, str]:
    """An environment that is given as a list of ``NAME=value`` and ``NAME``."""
    values = {}
    for index, item in enumerate(environment):
        if not isinstance(item, str):
            raise InvalidArgument(f"environment[{index}] is {kind(item)}, not text")
        name, equals, value = item.partition("=")
        if not name:
            raise InvalidArgument(f"environment[{index}] is empty, or starts with =")
        if not equals:
            if name.startswith("PREFECT__") or name not in os.environ:
                needed = "a variable of the flow's environment, and none of Prefect's own"
                raise InvalidArgument(f"environment[{index}] has no =, and is not {needed}")
            value = os.environ[name]
        values[name] = value
    return values


def check_words(words: Any, where: str) -> None:
    """Check a command or an entrypoint: a list of words, or text that the SDK splits into words."""
    if isinstance(words, str):
        try:
            split = shlex.split(words)
        except ValueError:
            raise InvalidArgument(f"{where} has a quotation mark or a \\ without its end") from None
        if split and split[0].startswith("[") and split[0] != "[":
            raise InvalidArgument(f"{where} is text that starts with [, and no JSON list")
    elif isinstance(words, list):
        for index, word in enumerate(words):
            if not isinstance(word, str):
                raise InvalidArgument(f"{where}[{index}] is {kind(word)}, not text")
    else:
        raise InvalidArgument(f"{where} is {kind(words)}")


def host_options(given: Any) -> dict[str, Any]:
    """Check ``host_config``, and return it as ``create_host_config()`` of the Docker SDK takes it.

    Raises InvalidArgument on a name that neither the SDK nor Docker knows, at any depth, and on a
    restart policy.
    """
    options = _known(given, _parameters(HostConfig), "host_config")
    for name, value in options.items():
        where = f"host_config.{name}"
        if value is None:
            continue
        if name in _IGNORED:
            raise InvalidArgument(f"{where} has no effect: {_IGNORED[name]}")
        if name in _NESTED:
            options[name] = _NESTED[name](value, where)
        _try(where, value, HostConfig, VERSION, **{name: options[name]})
    # an option that is right on its own may not go with another one
    _try("host_config", options, HostConfig, VERSION, **options)
    return options


def container_options(given: Any) -> dict[str, Any]:
    """Check ``extra_docker_kwargs``, and return it as the SDK's ``create_container()`` takes it.

    Raises InvalidArgument as ``host_options`` does, and for what a task takes as an argument of its
    own.
    """
    where = "extra_docker_kwargs"
    create_container = docker.APIClient.create_container
    names = _parameters(create_container)
    if "kwargs" in names and isinstance(given, Mapping):  # an SDK that takes any name
        names.extend(given)
    options = _known(given, names, where)
    for name, value in options.items():
        if name in ("image", "command", "environment", "host_config"):
            raise InvalidArgument(f"{where}.{name}: {name} is a parameter of its own")
        if value is None:
            continue
        if name in _ELSEWHERE:
            raise InvalidArgument(f"{where}.{name} has no effect: write it in {_ELSEWHERE[name]}")
        if name in _NESTED:
            options[name] = _NESTED[name](value, f"{where}.{name}")
    in_request = _parameters(ContainerConfig)
    for name, value in options.items():
        if name in in_request:
            _try(f"{where}.{name}", value, ContainerConfig, VERSION, "", "", **{name: value})
    return options


def pull_options(given: Any) -> dict[str, Any]:
    """Check ``extra_docker_kwargs`` of a pull, and return it as the SDK's ``pull()`` takes it."""
    where = "extra_docker_kwargs"
    options = _known(given, _parameters(docker.APIClient.pull), where)
    for name in ("repository", "tag", "stream", "decode"):
        if name in options:
            raise InvalidArgument(f"{where}.{name}: PullImage sets it itself")
    if options.get("auth_config") is not None:
        options["auth_config"] = _known(options["auth_config"], _LOGIN, f"{where}.auth_config")
    return options


# ------------------------------------------------------------------------------ names and values


def _shown(name: Any) -> str:
    """A name for a message, without what follows a =, which would be a value."""
    return abbreviated(repr(str(name).partition("=")[0]))


def _known(given: Any, names: Iterable[str], where: str) -> dict[str, Any]:
    """A mapping whose names are all known, with each name in the known spelling."""
    if not isinstance(given, Mapping):
        raise InvalidArgument(f"{where} is {kind(given)}, not a mapping")
    spellings = {plain(name): name for name in names}
    found: dict[str, Any] = {}
    for name, value in given.items():
        spelling = spellings.get(plain(str(name)))
        if spelling is None:
            without_effect = {*_IGNORED, *_ELSEWHERE}
            useful = [known for known in spellings.values() if known not in without_effect]
            hint = nearest(str(name)[:80], useful)
            raise InvalidArgument(f"{where} has the unknown name {_shown(name)}: {hint}")
        if spelling in found:
            raise InvalidArgument(f"{where} has {spelling} twice")
        found[spelling] = value
    return found


def _items(given: Any, where: str) -> list[tuple[Any, str]]:
    """The items of a list, each with where it is."""
    if not isinstance(given, (list, tuple)):
        raise InvalidArgument(f"{where} is {kind(given)}, not a list")
    return [(item, f"{where}[{index}]") for index, item in enumerate(given)]


def _parameters(function: Callable[..., Any]) -> list[str]:
    """The names of a function's parameters, without those that the SDK fills in."""
    names = inspect.signature(function).parameters
    return [name for name in names if name not in ("self", "version")]


def _properties(sdk_type: type) -> list[str]:
    """The names of what one of the SDK's types holds, where its constructor takes any name."""
    return [name for name, value in vars(sdk_type).items() if isinstance(value, property)]


def _try(where: str, value: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the SDK with a value, and raise one error if it does not take it."""
    try:
        return function(*args, **kwargs)
    except (TypeError, InvalidVersion) as error:  # these name types and versions
        raise InvalidArgument(f"{where}: {str(error).split('() ', 1)[-1]}") from None
    except DockerException as error:
        if type(error) is DockerException and isinstance(value, str):
            needed = "a size is a number of bytes, or text such as 512m or 1g"
            raise InvalidArgument(f"{where} is text that is no size; {needed}") from None
        raise InvalidArgument(f"{where} has values that do not fit together") from None
    except Exception:  # the SDK raises errors of many types, and some quote the value
        raise InvalidArgument(f"{where} is {kind(value)} that the Docker SDK refuses") from None


# -------------------------------------------------------------------------------- nested options


def _typed(sdk_type: type, given: Any, where: str) -> Any:
    options = _known(given, _properties(sdk_type), where)
    return _try(where, given, sdk_type, **options)


def _log_config(given: Any, where: str) -> Any:
    return _typed(LogConfig, given, where)


def _healthcheck(given: Any, where: str) -> Any:
    return _typed(Healthcheck, given, where)


def _ulimits(given: Any, where: str) -> list[Any]:
    return [_typed(Ulimit, item, place) for item, place in _items(given, where)]


def _device_requests(given: Any, where: str) -> list[Any]:
    return [_typed(DeviceRequest, item, place) for item, place in _items(given, where)]


# What Docker's API has for a type of mount. The SDK's Mount has parameters for some of these.
_MOUNT_OPTIONS = {
    "bind": (
        "BindOptions",
        (
            "Propagation",
            "NonRecursive",
            "CreateMountpoint",
            "ReadOnlyNonRecursive",
            "ReadOnlyForceRecursive",
        ),
    ),
    "volume": ("VolumeOptions", ("NoCopy", "Labels", "DriverConfig", "Subpath")),
    "tmpfs": ("TmpfsOptions", ("SizeBytes", "Mode", "Options")),
    "image": ("ImageOptions", ("Subpath",)),
    "cluster": ("ClusterOptions", ()),
}
_FOR_ANY_TYPE = ("target", "source", "type", "read_only", "consistency")


def _mounts(given: Any, where: str) -> list[Any]:
    return [_mount(item, place) for item, place in _items(given, where)]


def _mount(given: Any, where: str) -> Any:
    sections = [section for section, _ in _MOUNT_OPTIONS.values()]
    options = _known(given, [*_parameters(Mount), *sections], where)
    mount_type = options.setdefault("type", "volume")
    if mount_type not in list(_MOUNT_OPTIONS):
        raise InvalidArgument(f"{where}.type is none of {', '.join(_MOUNT_OPTIONS)}")
    own_section, names = _MOUNT_OPTIONS[mount_type]
    for name, value in options.items():
        if value is not None and not _is_for(name, mount_type):
            raise InvalidArgument(f"{where}.{name} has no effect on a mount of type {mount_type}")
    section = options.pop(own_section, None)
    mount = _sdk_mount({name: options[name] for name in options if name not in sections}, where)
    if section is not None:
        place = f"{where}.{own_section}"
        known = _known(section, names, place)
        if known.get("DriverConfig") is not None:
            known["DriverConfig"] = _driver_config(known["DriverConfig"], f"{place}.DriverConfig")
        mount[own_section] = _merged(mount.get(own_section, {}), known, place)
    return mount


def _is_for(name: str, mount_type: str) -> bool:
    """Whether Docker looks at an option of a mount. The SDK itself refuses most of the others."""
    if name in _FOR_ANY_TYPE or name == _MOUNT_OPTIONS[mount_type][0]:
        return True
    if name.endswith("Options") or mount_type in ("image", "cluster"):
        return False
    return name != "subpath" or mount_type == "volume"


def _sdk_mount(options: dict[str, Any], where: str) -> Any:
    """A mount with what the SDK's type knows. It does not know the types image and cluster."""
    if options.get("driver_config") is not None:
        options["driver_config"] = _driver_config(
            options["driver_config"], f"{where}.driver_config"
        )
    mount_type = options.pop("type")
    known_type = "volume" if mount_type in ("image", "cluster") else mount_type
    options.setdefault("source", None)
    mount = _try(where, options, Mount, type=known_type, **options)
    mount["Type"] = mount_type
    return mount


def _merged(some: Mapping[str, Any], more: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Options from two places. One that is in both is refused: Docker would get one of them."""
    twice = sorted(set(some) & set(more))
    if twice:
        raise InvalidArgument(f"{where} has {', '.join(twice)}, which is given elsewhere as well")
    return {**some, **more}


def _driver_config(given: Any, where: str) -> Any:
    return _try(where, given, DriverConfig, **_known(given, _parameters(DriverConfig), where))


def _binds(given: Any, where: str) -> Any:
    if isinstance(given, list):
        for item, place in _items(given, where):
            if not isinstance(item, str):
                raise InvalidArgument(
                    f"{place} is {kind(item)}, not text such as /workspace:/workspace:ro"
                )
        return given
    if not isinstance(given, Mapping):
        raise InvalidArgument(f"{where} is {kind(given)}, not a list or a mapping")
    binds = {}
    for folder, options in given.items():
        binds[folder] = options
        if isinstance(options, Mapping):
            binds[folder] = _bind(folder, options, f"{where}[{_shown(folder)}]")
    return binds


def _bind(folder: str, given: Mapping[str, Any], where: str) -> dict[str, Any]:
    options = _known(given, ("bind", "mode", "ro", "propagation"), where)
    if "bind" not in options:
        raise InvalidArgument(f"{where} lacks bind, the path in the container")
    bind = _try(where, options, convert_volume_binds, {folder: options})
    if options.get("propagation") is not None:
        others = {name: value for name, value in options.items() if name != "propagation"}
        if bind == convert_volume_binds({folder: others}):  # the SDK leaves out an unknown one
            raise InvalidArgument(f"{where}.propagation is unknown to the Docker SDK")
    return options


_PORT = tuple(convert_port_bindings({"80": 80})["80/tcp"][0])  # HostIp, HostPort


def _port_bindings(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InvalidArgument(f"{where} is {kind(given)}, not a mapping")
    bindings: dict[str, Any] = {}
    for port, binding in given.items():
        place = f"{where}[{_shown(port)}]"
        if _is_address_and_port(binding):
            bindings[port] = tuple(binding)
        elif isinstance(binding, list):
            bindings[port] = [_port_binding(item, place) for item in binding]
        else:
            bindings[port] = _port_binding(binding, place)
    return bindings


def _is_address_and_port(binding: Any) -> bool:
    """Whether a list is what the SDK takes as a tuple: JSON has no tuples."""
    if not isinstance(binding, list) or len(binding) != 2:
        return False
    address = binding[0]
    return isinstance(address, str) and ("." in address or ":" in address)


def _port_binding(given: Any, where: str) -> Any:
    if not isinstance(given, Mapping):
        return given
    binding = _known(given, _PORT, where)
    binding.setdefault("HostPort", None)  # any port
    return binding


def _devices(given: Any, where: str) -> list[Any]:
    [known] = parse_devices(["/dev/null"])
    devices = []
    for item, place in _items(given, where):
        devices.append(item if isinstance(item, str) else _known(item, known, place))
    return devices


def _weights(given: Any, where: str) -> list[Any]:
    return [_known(item, ("Path", "Weight"), place) for item, place in _items(given, where)]


def _rates(given: Any, where: str) -> list[Any]:
    return [_known(item, ("Path", "Rate"), place) for item, place in _items(given, where)]


def _list(given: Any, where: str) -> list[Any]:
    """A list that is not a text, whose letters the SDK would take as the items."""
    return [item for item, _ in _items(given, where)]


def _restart_policy(given: Any, where: str) -> dict[str, Any]:
    policy = _known(given, ("Name", "MaximumRetryCount"), where)
    if policy.get("Name") not in (None, "", "no"):
        cause = "WaitOnContainer could not tell an exit from a restart"
        raise InvalidArgument(f"{where} is not allowed: {cause}. Use Prefect's retries")
    return policy


def _networking_config(given: Any, where: str) -> Any:
    config = _known(given, _parameters(NetworkingConfig), where)
    networks = config.get("endpoints_config") or {}
    if not isinstance(networks, Mapping):
        raise InvalidArgument(f"{where}.EndpointsConfig is {kind(networks)}, not a mapping")
    endpoints: dict[Any, Any] = {}
    for network, options in networks.items():
        place = f"{where}.EndpointsConfig[{_shown(network)}]"
        endpoints[network] = _endpoint(options or {}, place)
    return NetworkingConfig(endpoints)  # type: ignore[arg-type] # one network, says its stub


def _endpoint(given: Any, where: str) -> Any:
    """The options of a container in a network. Docker's API has the addresses one level deeper."""
    options = _known(
        given, [*_parameters(EndpointConfig), "IPAMConfig", "DriverOpts", "GwPriority"], where
    )
    known = ("ipv4_address", "ipv6_address", "link_local_ips")
    addresses = _known(options.pop("IPAMConfig", None) or {}, known, f"{where}.IPAMConfig")
    options = _merged(options, addresses, where)
    if "DriverOpts" in options:
        options = _merged(options, {"driver_opt": options.pop("DriverOpts")}, where)
    as_is = {name: options.pop(name) for name in ("GwPriority", "links") if name in options}
    endpoint = _try(where, given, EndpointConfig, VERSION, **options)
    if isinstance(as_is.get("links"), Mapping):
        endpoint.update(_try(where, given, EndpointConfig, VERSION, links=as_is.pop("links")))
    elif "links" in as_is:
        endpoint["Links"] = as_is.pop("links")
    endpoint.update(as_is)
    return endpoint


def _ports(given: Any, where: str) -> Any:
    """Ports by number, or with their protocol, as 53 or [53, "udp"]."""
    if isinstance(given, list):
        return [tuple(port) if isinstance(port, list) else port for port in given]
    return _only_names(given, where)


def volume_folders(given: Any, where: str) -> Any:
    """Folders of the container that get a new volume each. A folder of the daemon is a bind."""
    folders = given if isinstance(given, (list, tuple, Mapping)) else [given]
    if any(isinstance(folder, str) and ":" in folder for folder in folders):
        raise InvalidArgument(
            f"{where} has no effect with a : in it: write it in host_config.binds"
        )
    return _only_names(given, where)


def _only_names(given: Any, where: str) -> Any:
    """Volumes and ports: Docker takes their names, and ignores what a mapping has for them."""
    if isinstance(given, Mapping):
        for name, value in given.items():
            if value:
                cause = "has no effect: host_config has binds for folders, port_bindings for ports"
                raise InvalidArgument(f"{where}[{_shown(name)}] is {kind(value)}, which {cause}")
    return given


def _size(given: Any, where: str) -> Any:
    if kind(given) not in ("a number", "text"):
        raise InvalidArgument(f"{where} is {kind(given)}, not a number of bytes, or text as 512m")
    return given


def _labels(given: Any, where: str) -> Any:
    if not isinstance(given, (list, Mapping)):
        raise InvalidArgument(f"{where} is {kind(given)}, not a mapping or a list")
    return given


def _words(given: Any, where: str) -> Any:
    check_words(given, where)
    return given


# Source: https://docs.docker.com/reference/api/engine/#section/Authentication
_LOGIN = (
    "username",
    "password",
    "auth",
    "email",
    "serveraddress",
    "identitytoken",
    "registrytoken",
)
# What Docker takes no notice of, though the SDK has an option for it.
_IGNORED = {
    "lxc_conf": "Docker has no LXC driver",
    "kernel_memory": "Docker no longer limits it",
    "cpu_count": "it is for Windows. On Linux it is nano_cpus, 10^9 for a CPU",
    "cpu_percent": "it is for Windows. On Linux it is nano_cpus, 10^9 for a CPU",
}
# What Docker 29 takes no notice of, where the SDK writes it.
_ELSEWHERE = {"mac_address": "networking_config", "runtime": "host_config"}
_NESTED: dict[str, Callable[[Any, str], Any]] = {
    "binds": _binds,
    "blkio_weight_device": _weights,
    "device_read_bps": _rates,
    "device_read_iops": _rates,
    "device_requests": _device_requests,
    "device_write_bps": _rates,
    "device_write_iops": _rates,
    "devices": _devices,
    "entrypoint": _words,
    "group_add": _list,
    "healthcheck": _healthcheck,
    "labels": _labels,
    "log_config": _log_config,
    "mem_limit": _size,
    "mem_reservation": _size,
    "memswap_limit": _size,
    "mounts": _mounts,
    "networking_config": _networking_config,
    "port_bindings": _port_bindings,
    "ports": _ports,
    "restart_policy": _restart_policy,
    "shm_size": _size,
    "ulimits": _ulimits,
    "volumes": volume_folders,
}
