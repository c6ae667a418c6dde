#!/usr/bin/env bash
# Builds what a Kubernetes 1.20.2 node needs, from Debian's `kubernetes` source package (everything
# is vendored), and prints the folder that holds the programs:
#
#   tests/airgap/kubernetes.sh        # about 5 minutes on two cores, an instant when cached
#
# No Debian binary package has the server parts, and no registry is needed this way.
set -euo pipefail

version=v1.20.2
programs=(kubeadm kubectl kubelet kube-apiserver kube-controller-manager kube-proxy kube-scheduler)
need_mb=2500

here=$(cd "$(dirname "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/docker-sidecar-on-kubernetes
out=$cache/kubernetes/$version
work=$cache/kubernetes/build
say() { echo "kubernetes.sh: [${SECONDS}s] $*" >&2; }

mkdir -p "$cache/kubernetes"
exec 9>"$cache/kubernetes/lock"
flock 9
if [ -d "$out" ]; then
    echo "$out"
    exit
fi

have_mb=$(df -Pm "$cache" | awk 'NR == 2 { print $4 }')
if [ "$have_mb" -lt "$need_mb" ]; then
    say "building Kubernetes needs $need_mb MB in $cache, which has $have_mb MB; free some or set XDG_CACHE_HOME"
    exit 1
fi

missing=()
for package in dpkg-dev golang-1.19-go make rsync; do
    dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null | grep -q '^installed$' || missing+=("$package")
done
if [ ${#missing[@]} -gt 0 ]; then
    say "installing ${missing[*]} with apt-get"
    "$here/../../scripts/apt-install.sh" --no-install-recommends "${missing[@]}"
fi

# the Go build cache in $work/gocache survives an interruption, the half-unpacked tree does not
source=$work/src/k8s.io/kubernetes
rm -rf "${work:?}"/{src,packages,bin}
mkdir -p "$work/src/k8s.io" "$work/packages"
say "fetching and unpacking the source package (about 10 s)"
cd "$work/packages"
"$here/apt.sh" bookworm update >&2
"$here/apt.sh" bookworm source --download-only kubernetes >&2
"$here/apt.sh" bookworm download golang-github-modern-go-reflect2-dev >&2
dpkg-source --no-check --extract kubernetes_*.dsc "$source" >/dev/null 2>&1

# The vendored reflect2 1.0.1 calls runtime functions by the signatures they had before Go 1.18;
# built with 1.19 it corrupts memory ("kubeadm init" panics). Debian packages the fixed 1.0.2.
dpkg-deb --extract golang-github-modern-go-reflect2-dev_*.deb reflect2
reflect2=$source/vendor/github.com/modern-go/reflect2
rm "$reflect2"/*.go "$reflect2"/*.s
cp reflect2/usr/share/gocode/src/github.com/modern-go/reflect2/*.{go,s} "$reflect2"

say "compiling ${programs[*]} (about 4 minutes on two cores)"
cd "$source"
env -u GO111MODULE PATH="/usr/lib/go-1.19/bin:$PATH" CGO_ENABLED=0 GOPATH="$work" GOCACHE="$work/gocache" \
    GOFLAGS=-tags=providerless,dockerless \
    make WHAT="${programs[*]/#/cmd/}" GOLDFLAGS="-s -w" >"$work/make.log" 2>&1 ||
    { tail -n 30 "$work/make.log" >&2; say "make failed, see $work/make.log"; exit 1; }

mkdir "$work/bin"
(cd _output/local/bin/linux/* && cp "${programs[@]}" "$work/bin")
mv "$work/bin" "$out"
rm -rf "$work"
say "done, $(du -sh "$out" | cut -f1) in $out"
echo "$out"
