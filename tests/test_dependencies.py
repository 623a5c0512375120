"""The packages that the trainers run on: known vulnerabilities, and the two ends of the versions that are tested."""

import json
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import distributions
from threading import Thread

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.version import Version


def pinned(file):
    """{package: (version, comment)} of a file in which each line pins one with ==."""
    packages = {}
    for line in (ROOT / file).read_text().splitlines():
        requirement, _, comment = line.partition("#")
        if requirement.strip():
            requirement = Requirement(requirement.strip())
            (specifier,) = requirement.specifier
            assert specifier.operator == "==", line
            packages[requirement.name] = Version(specifier.version), comment.strip()
    return packages


def vulnerabilities(packages, folder, *options):
    """Lines on the known vulnerabilities of `packages` {name: version}; skips the test if nothing is known of any."""
    file = folder / "packages.txt"
    file.write_text("".join(f"{name}=={version}\n" for name, version in packages.items()))
    command = [sys.executable, "-m", "pip_audit", "--requirement", file, "--no-deps", "--disable-pip"]
    command += ["--format", "json", "--progress-spinner", "off", "--cache-dir", folder / "cache", *options]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout.startswith("{"):
        pytest.skip(f"no service of vulnerabilities is reached: {done.stderr.strip().splitlines()[-1][:300]}")
    audited = json.loads(done.stdout)["dependencies"]
    unknown = [package["name"] for package in audited if "skip_reason" in package]
    # a mirror of PyPI may hold packages without what is known of them; pip-audit then finds no vulnerability
    if len(unknown) == len(audited):
        pytest.skip(f"the service of vulnerabilities knows none of {len(audited)} packages: a mirror of PyPI?")
    if unknown:
        print("not known to the service:", ", ".join(unknown))
    lines = []
    for package in audited:
        for known in package.get("vulns", ()):
            fixed_in = ", ".join(known["fix_versions"]) or "no version"
            lines.append(f"{package['name']} {package['version']}: {known['id']}, fixed in {fixed_in}")
    return lines


@pytest.mark.slow
def test_no_installed_package_has_a_known_vulnerability(tmp_path):
    installed = {package.name: Version(package.version).public for package in distributions()}
    assert not vulnerabilities(installed, tmp_path, "--timeout", "15")


@pytest.fixture
def service():
    """The address of a service in OSV's form that knows one vulnerability, of pillow."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            package = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["package"]
            ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "2.0"}]}]
            known = {"id": "PYSEC-1", "summary": "bad", "affected": [{"package": package, "ranges": ranges}]}
            answer = json.dumps({"vulns": [known]} if package["name"] == "pillow" else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_a_known_vulnerability_is_named_with_its_remedy(service, tmp_path):
    found = vulnerabilities({"pillow": "1.0", "numpy": "2.0"}, tmp_path, "-s", "osv", "--osv-url", service)
    assert found == ["pillow 1.0: PYSEC-1, fixed in 2.0"]


@pytest.mark.slow
def test_without_a_service_nothing_is_said_to_be_safe(tmp_path):
    with pytest.raises(pytest.skip.Exception, match="is reached"):
        vulnerabilities({"pillow": "1.0"}, tmp_path, "-s", "osv", "--osv-url", "http://127.0.0.1:9")


def test_requirements_say_from_which_version_each_package_is_tested():
    newest, oldest = pinned("requirements.txt"), pinned("tests/requirements-oldest.txt")
    assert newest.keys() == oldest.keys()
    for name, (version, comment) in newest.items():
        from_version = oldest[name][0]
        assert from_version <= version, name
        assert comment.startswith(f"from {from_version}: "), name
