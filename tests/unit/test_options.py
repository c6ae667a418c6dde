"""Docker's nested options: both spellings are understood, and an unknown name is refused."""

from typing import Any

import pytest
from docker.constants import DEFAULT_DOCKER_API_VERSION
from docker.errors import InvalidArgument
from docker.types import DeviceRequest, HostConfig, LogConfig, Mount, Ulimit

from flows.options import container_options, host_options, pull_options

SECRET = "hunter2"


def sent(host_config: dict[str, Any]) -> dict[str, Any]:
    """What Docker gets for a host_config."""
    return dict(HostConfig(DEFAULT_DOCKER_API_VERSION, **host_options(host_config)))


BIND = {"Target": "/w", "Source": "/w", "Type": "bind", "ReadOnly": True}
UNDERSTOOD = [
    (
        "mounts",
        [{"type": "bind", "source": "/w", "target": "/w", "read_only": True}],
        [{"Type": "bind", "Source": "/w", "Target": "/w", "ReadOnly": True}],
        "Mounts",
        [BIND],
    ),
    (
        "mounts",
        [{"type": "bind", "source": "/w", "target": "/w", "propagation": "rslave"}],
        [
            {
                "Type": "bind",
                "Source": "/w",
                "Target": "/w",
                "bind_options": {"propagation": "rslave"},
            }
        ],
        "Mounts",
        [{**BIND, "ReadOnly": False, "BindOptions": {"Propagation": "rslave"}}],
    ),
    (
        "mounts",
        [{"target": "/t", "type": "tmpfs", "tmpfs_size": 65536}],
        [{"Target": "/t", "Type": "tmpfs", "TmpfsOptions": {"SizeBytes": 65536}}],
        "Mounts",
        [
            {
                "Target": "/t",
                "Source": None,
                "Type": "tmpfs",
                "ReadOnly": False,
                "TmpfsOptions": {"SizeBytes": 65536},
            }
        ],
    ),
    (
        "mounts",
        [
            {
                "target": "/v",
                "source": "v",
                "driver_config": {"name": "local", "options": {"a": "b"}},
            }
        ],
        [
            {
                "Target": "/v",
                "Source": "v",
                "VolumeOptions": {"driver_config": {"Name": "local", "Options": {"a": "b"}}},
            }
        ],
        "Mounts",
        [
            {
                "Target": "/v",
                "Source": "v",
                "Type": "volume",
                "ReadOnly": False,
                "VolumeOptions": {"DriverConfig": {"Name": "local", "Options": {"a": "b"}}},
            }
        ],
    ),
    (
        "device_requests",
        [{"device_ids": ["0"], "capabilities": [["gpu"]]}],
        [{"DeviceIDs": ["0"], "Capabilities": [["gpu"]]}],
        "DeviceRequests",
        [
            {
                "Driver": "",
                "Count": 0,
                "DeviceIDs": ["0"],
                "Capabilities": [["gpu"]],
                "Options": {},
            }
        ],
    ),
    (
        "log_config",
        {"type": "local", "config": {"max-size": "1m"}},
        {"Type": "local", "Config": {"max-size": "1m"}},
        "LogConfig",
        {"Type": "local", "Config": {"max-size": "1m"}},
    ),
    (
        "ulimits",
        [{"name": "nofile", "soft": 1, "hard": 2}],
        [{"Name": "nofile", "Soft": 1, "Hard": 2}],
        "Ulimits",
        [{"Name": "nofile", "Soft": 1, "Hard": 2}],
    ),
    (
        "port_bindings",
        {"80/tcp": {"host_ip": "127.0.0.1", "host_port": 80}},
        {"80/tcp": [{"HostIP": "127.0.0.1", "HostPort": "80"}]},
        "PortBindings",
        {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": "80"}]},
    ),
    (
        "port_bindings",  # any port of the host
        {"80/tcp": {"host_ip": "127.0.0.1"}},
        {"80/tcp": [{"HostIp": "127.0.0.1"}]},
        "PortBindings",
        {"80/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]},
    ),
    (
        "devices",
        [{"path_on_host": "/a", "path_in_container": "/b", "cgroup_permissions": "r"}],
        ["/a:/b:r"],
        "Devices",
        [{"PathOnHost": "/a", "PathInContainer": "/b", "CgroupPermissions": "r"}],
    ),
    (
        "device_read_bps",
        [{"path": "/dev/sda", "rate": 1}],
        [{"Path": "/dev/sda", "Rate": 1}],
        "BlkioDeviceReadBps",
        [{"Path": "/dev/sda", "Rate": 1}],
    ),
    (
        "blkio_weight_device",
        [{"path": "/dev/sda", "weight": 10}],
        [{"Path": "/dev/sda", "Weight": 10}],
        "BlkioWeightDevice",
        [{"Path": "/dev/sda", "Weight": 10}],
    ),
    (
        "binds",
        {"/w": {"bind": "/w", "mode": "ro"}},
        {"/w": {"Bind": "/w", "Mode": "ro"}},
        "Binds",
        ["/w:/w:ro"],
    ),
]


@pytest.mark.parametrize(("name", "sdk", "api", "key", "expected"), UNDERSTOOD)
def test_both_spellings_mean_the_same(
    name: str, sdk: Any, api: Any, key: str, expected: Any
) -> None:
    assert sent({name: sdk})[key] == expected
    assert sent({name: api})[key] == expected


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mounts", [Mount("/w", "/w", type="bind", read_only=True, propagation="rslave")]),
        ("mounts", [Mount("/v", "v", no_copy=True, labels={"a": "b"})]),
        ("mounts", [Mount("/t", None, type="tmpfs", tmpfs_size="1m", tmpfs_mode=0o1777)]),
        ("log_config", LogConfig(type="local", config={"max-file": "2"})),
        ("ulimits", [Ulimit(name="nofile", soft=1, hard=2)]),
        ("device_requests", [DeviceRequest(count=-1, capabilities=[["gpu"]])]),
    ],
)
def test_the_sdks_own_types_are_taken_as_they_are(name: str, value: Any) -> None:
    assert sent({name: value}) == HostConfig(DEFAULT_DOCKER_API_VERSION, **{name: value})


@pytest.mark.parametrize(
    "mount",
    [
        {"Type": "image", "Source": "app:1", "Target": "/a", "ImageOptions": {"Subpath": "b"}},
        {"Type": "bind", "Source": "/w", "Target": "/w", "BindOptions": {"NonRecursive": True}},
    ],
)
def test_what_the_sdk_has_no_type_for_is_taken_as_docker_writes_it(mount: dict[str, Any]) -> None:
    [made] = sent({"mounts": [mount]})["Mounts"]
    assert made.items() >= mount.items()


UNKNOWN = [
    ({"mounts": [{"target": "/w", "readonli": True}]}, "did you mean read_only?"),
    ({"mounts": [{"target": "/w", "bind_option": {}}]}, "did you mean BindOptions?"),
    (
        {"mounts": [{"target": "/w", "type": "bind", "BindOptions": {"propagate": 1}}]},
        "did you mean Propagation?",
    ),
    ({"mounts": [{"target": "/w", "VolumeOptions": {"copy": 1}}]}, "VolumeOptions has the"),
    ({"mounts": [{"target": "/w", "type": "tmpfs", "TmpfsOptions": {"size": 1}}]}, "SizeBytes"),
    ({"mounts": [{"target": "/w", "driver_config": {"nam": 1}}]}, "did you mean name?"),
    ({"mounts": {"target": "/w"}}, "mounts is a mapping, not a list"),
    ({"mounts": ["/w:/w"]}, "mounts[0] is text, not a mapping"),
    ({"mounts": [{"target": "/w", "type": SECRET}]}, "mounts[0].type is none of bind"),
    ({"mounts": [{"source": "/w"}]}, "'target'"),
    ({"mounts": [{"target": "/w", "TmpfsOptions": {"SizeBytes": 1}}]}, "on a mount of type volume"),
    ({"mounts": [{"target": "/w", "type": "bind", "VolumeOptions": {}}]}, "VolumeOptions has no"),
    ({"mounts": [{"target": "/w", "type": "bind", "ImageOptions": {}}]}, "ImageOptions has no"),
    ({"mounts": [{"target": "/w", "type": "tmpfs", "BindOptions": {}}]}, "BindOptions has no"),
    ({"mounts": [{"target": "/w", "type": "tmpfs", "subpath": "a"}]}, "subpath has no effect"),
    ({"mounts": [{"target": "/w", "type": "image", "subpath": "a"}]}, "subpath has no effect"),
    ({"mounts": [{"target": "/w", "type": "image", "labels": {"a": "b"}}]}, "labels has no effect"),
    ({"mounts": [{"target": "/w", "type": "npipe"}]}, "mounts[0].type is none of bind"),
    ({"mounts": [{"target": "/w", "type": ["bind"]}]}, "mounts[0].type is none of bind"),
    (
        {
            "mounts": [
                {
                    "target": "/w",
                    "source": "/w",
                    "type": "bind",
                    "propagation": "rslave",
                    "BindOptions": {"Propagation": "shared"},
                }
            ]
        },
        "Propagation, which is given elsewhere as well",
    ),
    ({"cpu_count": 2}, "cpu_count has no effect: it is for Windows"),
    ({"cpu_percent": 2}, "cpu_percent has no effect: it is for Windows"),
    ({"mem_limit": []}, "mem_limit is a list, not a number of bytes"),
    ({"memswap_limit": {}}, "memswap_limit is a mapping"),
    ({"mem_reservation": True}, "mem_reservation is true or false"),
    ({"shm_size": []}, "shm_size is a list"),
    ({"binds": {"/w": {"bind": "/w", "propagation": "rw"}}}, "propagation is unknown"),
    (
        {"binds": {"/w": {"bind": "/w", "mode": "ro", "propagation": "ro"}}},
        "is unknown to the Docker SDK",
    ),
    ({"mounts": [{"target": "/w", "type": "bind", "tmpfs_size": 1}]}, "do not fit together"),
    ({"mounts": [{"target": "/w", "ReadOnly": True, "read_only": False}]}, "read_only twice"),
    ({"device_requests": [{"gpus": -1}]}, "device_requests[0] has the unknown name 'gpus'"),
    ({"log_config": {"typ": "local"}}, "did you mean type?"),
    ({"log_config": {"type": "local", "options": {}}}, "log_config has the unknown name"),
    ({"ulimits": [{"name": "nofile", "sof": 1}]}, "did you mean soft?"),
    ({"ulimits": [{"name": "nofile", "soft": SECRET}]}, "ulimits[0]"),
    ({"restart_policy": {"condition": "any"}}, "known: Name, MaximumRetryCount"),
    ({"restart_policy": {"Name": "always"}}, "Use Prefect's retries"),
    ({"restart_policy": {"name": "on-failure"}}, "Use Prefect's retries"),
    ({"binds": {"/w": {"bind": "/w", "read_only": True}}}, "binds['/w'] has the unknown name"),
    ({"binds": {"/w": {"mode": "ro"}}}, "lacks bind"),
    ({"binds": {"/w": {"bind": "/w", "propagation": SECRET}}}, "propagation is unknown"),
    ({"binds": {"/w": {"bind": "/w", "ro": True, "mode": SECRET}}}, "binds['/w']"),
    ({"binds": [{"bind": "/w"}]}, "binds[0] is a mapping, not text"),
    ({"port_bindings": {"80/tcp": {"HostAddress": "127.0.0.1"}}}, "port_bindings['80/tcp'] has"),
    ({"port_bindings": [80]}, "port_bindings is a list, not a mapping"),
    ({"devices": [{"path": "/dev/sda"}]}, "devices[0] has the unknown name 'path'"),
    ({"devices": "/dev/sda"}, "devices is text, not a list"),
    ({"group_add": "1000"}, "group_add is text, not a list"),
    ({"device_write_bps": [{"path": "/dev/sda", "weight": 1}]}, "known: Path, Rate"),
    ({"device_read_iops": [{"device": "/dev/sda"}]}, "device_read_iops[0]"),
    ({"device_write_iops": [{"Path": "/dev/sda", "Rat": 1}]}, "did you mean Rate?"),
    ({"blkio_weight_device": [{"Path": "/dev/sda", "Rate": 1}]}, "known: Path, Weight"),
    ({"lxc_conf": {"a": "b"}}, "lxc_conf has no effect"),
    ({"kernel_memory": "1g"}, "kernel_memory has no effect"),
    ({"cpu_quota": SECRET}, "cpu_quota"),
    ({"userns_mode": SECRET}, "userns_mode is text that the Docker SDK refuses"),
    ({"tmpfs": 5}, "tmpfs"),
    ({"CapAd": ["ALL"]}, "did you mean cap_add?"),
]


@pytest.mark.parametrize(("host_config", "says"), UNKNOWN, ids=str)
def test_an_unknown_name_in_host_config_is_refused(host_config: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        host_options(host_config)
    assert str(error.value).startswith("host_config")
    assert says in str(error.value)
    assert SECRET not in str(error.value)


ENDPOINT = {"net": {"ipv4_address": "10.0.0.2", "aliases": ["a"], "links": ["b:c"]}}
API_ENDPOINT = {
    "net": {"IPAMConfig": {"IPv4Address": "10.0.0.2"}, "Aliases": ["a"], "Links": ["b:c"]}
}


@pytest.mark.parametrize("networks", [ENDPOINT, API_ENDPOINT])
@pytest.mark.parametrize("name", ["EndpointsConfig", "endpoints_config"])
def test_a_container_in_a_network(networks: dict[str, Any], name: str) -> None:
    options = container_options({"networking_config": {name: networks}})
    assert options["networking_config"] == {"EndpointsConfig": API_ENDPOINT}


def test_what_the_sdks_type_of_a_network_lacks_is_handed_on() -> None:
    networks = {"net": {"GwPriority": 1}}
    options = container_options({"networking_config": {"EndpointsConfig": networks}})
    assert options["networking_config"] == {"EndpointsConfig": networks}


@pytest.mark.parametrize("spelling", ["start_period", "StartPeriod"])
def test_a_healthcheck_in_both_spellings(spelling: str) -> None:
    options = container_options({"healthcheck": {"test": "true", spelling: 10**9}})
    assert options["healthcheck"]["StartPeriod"] == 10**9


UNKNOWN_ELSEWHERE = [
    ({"healthcheck": {"cmd": SECRET}}, "healthcheck has the unknown name 'cmd'"),
    ({"healthcheck": {"test": SECRET, "intervall": 1}}, "did you mean interval?"),
    ({"networking_config": {"net": {}}}, "networking_config has the unknown name 'net'"),
    ({"networking_config": {"EndpointsConfig": {"net": {"alias": []}}}}, "did you mean aliases?"),
    (
        {"networking_config": {"EndpointsConfig": {"net": {"IPAMConfig": {"ip": SECRET}}}}},
        "IPAMConfig has the unknown name 'ip'",
    ),
    ({"volumes": {"/w": {"bind": "/w", "mode": "ro"}}}, "volumes['/w'] is a mapping, which has no"),
    ({"volumes": ["/a", f"/w:{SECRET}:ro"]}, "write it in host_config.binds"),
    ({"volumes": "/w:/w"}, "write it in host_config.binds"),
    (
        {
            "networking_config": {
                "EndpointsConfig": {
                    "net": {"ipv4_address": "10.0.0.2", "IPAMConfig": {"IPv4Address": SECRET}}
                }
            }
        },
        "ipv4_address, which is given elsewhere as well",
    ),
    (
        {
            "networking_config": {
                "EndpointsConfig": {"net": {"driver_opt": {"a": "b"}, "DriverOpts": {"c": SECRET}}}
            }
        },
        "driver_opt, which is given elsewhere as well",
    ),
    ({"ports": {"80/tcp": {"HostPort": "80"}}}, "ports['80/tcp'] is a mapping, which has no"),
    ({"runtime": "runsc"}, "runtime has no effect: write it in host_config"),
    ({"mac_address": SECRET}, "mac_address has no effect: write it in networking_config"),
    ({"entrypoint": ["sh", 5]}, "entrypoint[1] is a number"),
]


@pytest.mark.parametrize(("options", "says"), UNKNOWN_ELSEWHERE, ids=str)
def test_an_unknown_name_in_extra_docker_kwargs_is_refused(
    options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidArgument) as error:
        container_options(options)
    assert str(error.value).startswith("extra_docker_kwargs")
    assert says in str(error.value)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"auth_config": {"user": "u", "password": SECRET}}, "did you mean username?"),
        ({"platfrom": "linux"}, "did you mean platform?"),
        ({"stream": True}, "PullImage sets it itself"),
    ],
)
def test_an_unknown_name_in_a_pull_is_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidArgument) as error:
        pull_options(options)
    assert says in str(error.value)
    assert SECRET not in str(error.value)


def test_null_is_as_good_as_nothing_for_an_option_without_effect() -> None:
    assert host_options({"lxc_conf": None}) == {"lxc_conf": None}
    assert container_options({"runtime": None}) == {"runtime": None}


def test_json_has_lists_where_the_sdk_has_tuples() -> None:
    assert container_options({"ports": [80, [53, "udp"]]})["ports"] == [80, (53, "udp")]
    address = host_options({"port_bindings": {"80": ["127.0.0.1", 8080]}})
    assert address["port_bindings"] == {"80": ("127.0.0.1", 8080)}
    two_ports = host_options({"port_bindings": {"80": [8080, 8081]}})
    assert two_ports["port_bindings"] == {"80": [8080, 8081]}


def test_an_option_without_effect_is_no_advice() -> None:
    with pytest.raises(InvalidArgument) as refusal:
        host_options({"memory": "1g"})
    assert "mem_limit" in str(refusal.value)
    assert "kernel_memory" not in str(refusal.value)
