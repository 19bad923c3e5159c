"""What Kubernetes gets: rendered, valid, confined, and complete from start to eviction."""

import re
import shutil
import subprocess
from functools import cache

import pytest
import yaml
from build_images import IMAGES
from children import Child, run
from rendered_manifests import DIGEST, OVERLAYS, RENDERED, ROOT, SOURCES, digest, kubectl, render

from vmibridge.cli import main
from vmibridge.engine.settings import ServerSettings

PAGE = ROOT / "docs/kubernetes.md"
GROUP = 10000
USERS = {
    IMAGES["bridge"]: 10001,
    IMAGES["qemu"]: 10002,
    "docker.io/library/nats:2.15-scratch": 10003,
}
PROBES = ("startup", "readiness", "liveness")
QUITS = 10
"""Seconds that `vmibridge qemu stop` takes above its `--within`, at most."""

NO_KUBECTL = "no kubectl of 1.21 or later, which Debian 12 has not: what was rendered is tested"

overlays = pytest.mark.parametrize("name", OVERLAYS)


@cache
def documents(name):
    return list(yaml.safe_load_all((RENDERED / f"{name}.yaml").read_text()))


def of_kind(name, *kinds):
    return {each["metadata"]["name"]: each for each in documents(name) if each["kind"] in kinds}


def workloads(name):
    return of_kind(name, "StatefulSet", "Deployment", "Job")


def pods(name):
    return {each: found["spec"]["template"] for each, found in workloads(name).items()}


def containers(pod):
    return [*pod["spec"].get("initContainers", []), *pod["spec"]["containers"]]


def container(name, workload, called):
    (found,) = [each for each in containers(pods(name)[workload]) if each["name"] == called]
    return found


# --- rendered -----------------------------------------------------------------------------


def test_each_overlay_is_kept_as_it_was_rendered_of_these_sources():
    """Else render them again, as `rendered_manifests` says."""
    assert {path.stem for path in RENDERED.glob("*.yaml")} == set(OVERLAYS)
    assert DIGEST.read_text().strip() == digest()


@overlays
def test_kubectl_renders_what_is_kept(name):
    if kubectl() is None:
        pytest.skip(NO_KUBECTL)
    assert list(yaml.safe_load_all(render(name))) == documents(name)


@overlays
def test_it_is_of_the_schemas(name):
    import kubernetes_validate  # takes a second, which no other test needs

    version = kubernetes_validate.latest_version()
    for document in documents(name):
        kubernetes_validate.validate(document, version, strict=True)


@overlays
def test_names_lead_to_what_is_there(name):
    for workload, pod in pods(name).items():
        for volume in pod["spec"].get("volumes", []):
            if "configMap" in volume:
                assert volume["configMap"]["name"] in of_kind(name, "ConfigMap"), workload
    labels = [pod["metadata"]["labels"] for pod in pods(name).values()]
    selectors = [
        *(each["spec"]["selector"] for each in of_kind(name, "Service").values()),
        *(
            each["spec"]["selector"]["matchLabels"]
            for each in of_kind(name, "PodDisruptionBudget").values()
        ),
        *(
            each["spec"]["podSelector"]["matchLabels"]
            for each in of_kind(name, "NetworkPolicy").values()
        ),
    ]
    for selector in selectors:
        assert any(selector.items() <= each.items() for each in labels), selector
    hosts = set(re.findall(r"(?:tls:|nats://)(vmibridge-[a-z]+)", str(documents(name))))
    assert hosts <= set(of_kind(name, "Service"))


def test_the_config_map_of_the_handlers_is_named_by_a_hash():
    (found,) = of_kind("base", "ConfigMap")
    assert re.fullmatch(r"vmibridge-handlers-[a-z0-9]{10}", found)


def test_other_handlers_are_a_roll_out(tmp_path):
    """Another config map, and pods that name it."""
    if kubectl() is None:
        pytest.skip(NO_KUBECTL)
    copy = tmp_path / "base"
    shutil.copytree(SOURCES / "base", copy)
    with (copy / "handlers/example.py").open("a") as file:
        file.write("\n# other handlers\n")
    done = run(["kubectl", "kustomize", copy], check=True)
    (other,) = [each for each in yaml.safe_load_all(done.stdout) if each["kind"] == "ConfigMap"]
    assert other["metadata"]["name"] not in of_kind("base", "ConfigMap")
    assert done.stdout.count(other["metadata"]["name"]) == 2


def test_the_overlay_of_the_page_renders(tmp_path):
    if kubectl() is None:
        pytest.skip(NO_KUBECTL)
    (overlay,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    own = tmp_path / "own"
    (own / "handlers").mkdir(parents=True)
    (own / "handlers/web.py").write_text("# handlers\n")
    (own / "kustomization.yaml").write_text(overlay)
    shutil.copytree(SOURCES, tmp_path / "vmibridge/docker/kubernetes")
    done = run(["kubectl", "kustomize", own], check=True)
    found = {each["kind"]: each for each in yaml.safe_load_all(done.stdout)}
    assert found["ConfigMap"]["data"] == {"web.py": "# handlers\n"}
    machines = found["StatefulSet"]["spec"]
    assert machines["replicas"] == 5
    (qemu,) = machines["template"]["spec"]["containers"]
    assert qemu["image"] == "registry.example/vmibridge-qemu:1"
    assert qemu["args"][qemu["args"].index("-m") + 1] == "512"


# --- confined -----------------------------------------------------------------------------


@overlays
def test_containers_are_confined(name):
    for pod in pods(name).values():
        assert pod["spec"]["automountServiceAccountToken"] is False
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert pod["spec"]["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in containers(pod):
            context = {**pod["spec"]["securityContext"], **each["securityContext"]}
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["runAsUser"] == USERS[each["image"]]
            if each["image"] in IMAGES.values():
                assert context["fsGroup"] == context["runAsGroup"] == GROUP


@overlays
def test_what_a_container_uses_is_bounded(name):
    for pod in pods(name).values():
        for each in containers(pod):
            limits = each["resources"]["limits"]
            # Its log is in there.
            assert limits.keys() == {"cpu", "memory", "ephemeral-storage"}
            assert each["resources"]["requests"].keys() == limits.keys()
            assert ("--record" in each["args"]) <= ("--keep" in each["args"])
        for volume in pod["spec"].get("volumes", []):
            assert "sizeLimit" in volume.get("emptyDir", {"sizeLimit": ""})


@overlays
def test_a_network_reaches_what_it_has_to_and_nothing_else(name):
    """Each pod has a policy for both directions; peers are named by label and port."""
    policies = of_kind(name, "NetworkPolicy")
    for each in policies.values():
        assert each["spec"]["policyTypes"] == ["Ingress", "Egress"]
    assert set(policies) == set(pods(name))
    reached = {
        (policy, ends(peer), port["port"])
        for policy, each in policies.items()
        for rule in each["spec"].get("egress", [])
        for peer in rule["to"]
        for port in rule["ports"]
    }
    dns, vm, server, nats = "kube-dns", "vmibridge-vm", "vmibridge-server", "vmibridge-nats"
    expected = {"tls": {(vm, server, 7443)}, "nats": {(vm, nats, 4222), (server, nats, 4222)}}
    expected["tls-recordings"] = expected["tls"]
    links = expected.get(name, set())
    assert reached == links | {(source, dns, 53) for source, _, _ in links}
    let_in = {
        (source, policy, port["port"])
        for policy, each in policies.items()
        for rule in each["spec"].get("ingress", [])
        for peer in rule["from"]
        for source in ends(peer).split()
        for port in rule["ports"]
    }
    assert let_in == links


def ends(peer):
    """The pods of one peer of a policy."""
    selector = peer["podSelector"]
    if "namespaceSelector" in peer:
        assert peer["namespaceSelector"]["matchLabels"] == {
            "kubernetes.io/metadata.name": "kube-system"
        }
    expressions = selector.get("matchExpressions", [])
    listed = [value for each in expressions for value in each["values"]]
    return " ".join([*selector.get("matchLabels", {}).values(), *listed])


def test_each_side_of_tls_has_its_own_key_and_no_other():
    secrets = {
        workload: [
            each["secret"]["secretName"] for each in pod["spec"]["volumes"] if "secret" in each
        ]
        for workload, pod in pods("tls").items()
    }
    assert secrets == {
        "vmibridge-vm": ["vmibridge-agent"],
        "vmibridge-server": ["vmibridge-server"],
    }
    assert "/tls" not in str(container("tls", "vmibridge-vm", "qemu"))


# --- what is run --------------------------------------------------------------------------


@overlays
def test_commands_are_understood_by_vmibridge(name, capsys):
    lines = []
    for pod in pods(name).values():
        for each in containers(pod):
            if each["image"] == IMAGES["bridge"]:
                lines.append(each["args"])
                asked = [each[f"{probe}Probe"] for probe in PROBES]
                asked += each.get("lifecycle", {}).values()
                lines += [found["exec"]["command"][1:] for found in asked]
    assert lines
    for words in lines:
        command = [word for word in words[:2] if word.isalpha()]
        main([*command, "--help"])
        known = capsys.readouterr().out
        assert all(word in known for word in words if word.startswith("--")), words


@overlays
def test_what_serves_is_probed_by_its_own_answers(name):
    """All of them ask one socket, which no other container can write to."""
    for pod in pods(name).values():
        for each in containers(pod):
            if each["image"] != IMAGES["bridge"]:
                continue
            asked = {probe: each[f"{probe}Probe"]["exec"]["command"] for probe in PROBES}
            assert asked == {
                "startup": ["vmibridge", "health", "--started"],
                "readiness": ["vmibridge", "health", "--ready"],
                "liveness": ["vmibridge", "health", "--live"],
            }
            assert {"name": "VMIBRIDGE_HEALTH_SOCKET", "value": "/tmp/health.sock"} in each["env"]
            (scratch,) = [at["name"] for at in each["volumeMounts"] if at["mountPath"] == "/tmp"]
            mounts = [at["name"] for other in containers(pod) for at in other["volumeMounts"]]
            assert mounts.count(scratch) == 1


@overlays
def test_the_bridge_serves_before_qemu_starts(name):
    (bridge,) = pods(name)["vmibridge-vm"]["spec"]["initContainers"]
    (qemu,) = pods(name)["vmibridge-vm"]["spec"]["containers"]
    assert bridge["restartPolicy"] == "Always", "a sidecar"
    shared = {mount["name"] for mount in bridge["volumeMounts"]}
    assert shared & {mount["name"] for mount in qemu["volumeMounts"]} == {"sockets"}
    (plugin,) = [word for word in qemu["args"] if "plugin.so" in word]
    (backend,) = [word for word in bridge["args"] if "qemu-plugin:" in word]
    assert "socket=/run/vmibridge/vmi.sock,absent=wait" in plugin
    assert "qemu-plugin:unix:/run/vmibridge/vmi.sock?mode=0o660&stay=true" in backend


def test_agents_are_named_as_their_pods():
    """Two VMs of one name would be one to the servers."""
    for name in ("tls", "nats"):
        bridge = container(name, "vmibridge-vm", "bridge")
        assert "$(POD)=qemu-plugin:" in str(bridge["args"])
        (pod,) = [each for each in bridge["env"] if each["name"] == "POD"]
        assert pod["valueFrom"] == {"fieldRef": {"fieldPath": "metadata.name"}}


@pytest.mark.parametrize(
    ("name", "workload"),
    [("recordings", "vmibridge-vm"), ("tls-recordings", "vmibridge-server")],
)
def test_recordings_are_on_a_claim_of_each_pod_with_room_to_spare(name, workload):
    found = workloads(name)[workload]["spec"]
    (claim,) = found["volumeClaimTemplates"]
    (writer,) = [each for each in containers(found["template"]) if "--record" in each["args"]]
    at = writer["args"].index("--record")
    assert writer["args"][at:] == ["--record", "/recordings", "--keep", "1G"]
    assert {"name": claim["metadata"]["name"], "mountPath": "/recordings"} in writer["volumeMounts"]
    assert claim["spec"]["resources"]["requests"] == {"storage": "2Gi"}


def test_handlers_are_loaded_from_a_config_map(tmp_path, capsys):
    """As kubelet mounts it: links to a folder whose name begins with two dots."""
    (found,) = of_kind("base", "ConfigMap").values()
    folder = tmp_path / "handlers"
    there = folder / "..2026_11_30_00_00_00.1"
    there.mkdir(parents=True)
    (folder / "..data").symlink_to(there.name)
    for name, text in found["data"].items():
        (there / name).write_text(text)
        (folder / name).symlink_to(f"..data/{name}")
    assert main(["handlers", "list", str(folder)]) == 0
    assert capsys.readouterr().out.count("number: U64") == 1


# --- where pods are, and how they go --------------------------------------------------------


@overlays
def test_pods_of_a_kind_are_spread_and_go_one_at_a_time(name):
    budgets = of_kind(name, "PodDisruptionBudget")
    for workload, found in workloads(name).items():
        if workload == "vmibridge-nats":
            continue
        spread = found["spec"]["template"]["spec"]["topologySpreadConstraints"]
        assert [each["topologyKey"] for each in spread] == [
            "kubernetes.io/hostname",
            "topology.kubernetes.io/zone",
        ]
        # A budget for pods of a job would keep a node from being drained.
        assert (workload in budgets) == (found["kind"] == "StatefulSet")
    assert all(each["spec"]["maxUnavailable"] == 1 for each in budgets.values())


@overlays
def test_a_pod_has_the_time_that_its_stop_takes(name):
    for workload, pod in pods(name).items():
        grace = pod["spec"]["terminationGracePeriodSeconds"]
        stop = ServerSettings().grace + ServerSettings().stop_timeout
        if workload != "vmibridge-vm":
            assert grace > stop
            continue
        hook = container(name, workload, "bridge")["lifecycle"]["preStop"]["exec"]["command"]
        assert hook[:-1] == [
            *("vmibridge", "qemu", "stop", "--qmp", "/run/vmibridge/qmp.sock"),
            *("--powerdown", "--within"),
        ]
        guest = int(hook[-1]) + QUITS
        qemu = container(name, workload, "qemu")
        (kept,) = re.findall(r"sleep\W+(\d+)", str(qemu["lifecycle"]["preStop"]))
        assert guest < int(kept), "QEMU has no signal before its guest has gone"
        assert int(kept) + stop < grace
        assert "unix:/run/vmibridge/qmp.sock,server=on,wait=off" in qemu["args"]


# --- a job --------------------------------------------------------------------------------


def test_a_job_has_the_pods_of_the_base():
    base = dict(pods("base")["vmibridge-vm"]["spec"])
    job = dict(pods("job")["vmibridge-vm"]["spec"])
    (qemu,), (own,) = base.pop("containers"), job.pop("containers")
    assert job.pop("restartPolicy") == "Never"
    assert job == base
    assert {**own, "lifecycle": None, "command": None} == {
        **qemu,
        "lifecycle": None,
        "command": None,
    }


@pytest.fixture
def shell(tmp_path):
    """The command of a job's QEMU, with a QEMU that ends as it is told."""
    qemu = container("job", "vmibridge-vm", "qemu")
    mark = str(tmp_path / "stopped")
    stub = tmp_path / "qemu-entrypoint"
    stub.write_text('#!/bin/sh\necho started\nread status\nexit "$status"\n')
    stub.chmod(0o755)
    command = [word.replace("/tmp/stopped", mark) for word in qemu["command"]]
    hook = qemu["lifecycle"]["preStop"]["exec"]["command"]

    def start():
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        return Child([*command, *qemu["args"]], stdin=subprocess.PIPE, env=environment)

    start.hook = [word.replace("/tmp/stopped", mark).replace("sleep 60", "true") for word in hook]
    return start


@pytest.mark.parametrize("status", [0, 1, 67])
def test_the_status_of_a_jobs_guest_is_that_of_its_pod(shell, status):
    with shell() as child:
        assert child.stdout.readline() == "started\n"
        child.stdin.write(f"{status}\n")
        child.stdin.close()
        assert child.wait() == status


def test_a_jobs_guest_that_was_told_to_go_is_not_done(shell):
    (policy,) = [each["spec"]["podFailurePolicy"]["rules"] for each in workloads("job").values()]
    with shell() as child:
        assert child.stdout.readline() == "started\n"
        run(shell.hook, check=True)
        child.stdin.write("0\n")
        child.stdin.close()
        status = child.wait()
    assert status == 143
    assert policy[0] == {
        "action": "Ignore",
        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
    }
    assert policy[1]["onExitCodes"] == {
        "containerName": "qemu",
        "operator": "NotIn",
        "values": [0, status],
    }
