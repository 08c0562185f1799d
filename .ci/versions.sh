#!/usr/bin/env bash
# A short set of tests with the newest and with the lowest versions of the dependencies, each in a new environment, the
# newest in .venv if it has them: exactness, the cache protocol, a short demo, and deprecation warnings caused by our
# calls. Reports failures, but exits with 0: `make test` uses constraints.txt, and this shows what to look at next.
#
#   bash .ci/versions.sh [newest|floor]
#
# Nothing is compiled to bytecode beforehand: of torch and transformers, only a small part is imported here.
set -uo pipefail
cd "$(dirname "$0")/.."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Whether .venv has the newest versions already. Then it is used: a new environment would hold the same.
is_newest() {
	[ -x .venv/bin/python ] &&
		.venv/bin/python -m pip install --quiet --disable-pip-version-check --dry-run --upgrade \
			--upgrade-strategy eager --report "$work/report.json" -e . 2> "$work/log" &&
		.venv/bin/python .ci/versions.py same "$work/report.json"
}

try() { # name, pip's arguments...
	local name=$1 python="$work/$1/bin/python"
	shift
	"${PYTHON:-python3}" -m venv "$work/$name" &&
		"$python" -m pip install --quiet --disable-pip-version-check --upgrade "pip>=24" 2> "$work/log" &&
		"$python" -m pip install --quiet --disable-pip-version-check --no-compile "$@" -e . pytest pytest-asyncio hypothesis 2> "$work/log" || {
		tail -n 5 "$work/log"
		echo "installation failed: the index does not serve these versions"
		return 1
	}
	check "$work/$name/bin"
}

check() { # folder of python and tieredkv
	local python="$1/python"
	"$python" -m pip list --disable-pip-version-check 2> /dev/null | grep -E "^(torch|torchvision|transformers|accelerate|numpy|av) "
	"$python" -m pytest -q -p no:cacheprovider tests/cache/test_exactness.py tests/cache/test_cache_protocol.py || return 1
	PYTHONWARNINGS=default "$1/tieredkv" demo --minutes 1 --share 0.5 2> "$work/stderr" || {
		tail -n 20 "$work/stderr"
		return 1
	}
	# Neither typer's warnings about click nor torchao's about its enums, which .venv has, are caused by our calls.
	if grep -iE "deprecat" "$work/stderr" | grep -vE "site-packages/typer/|<enum '(KernelPreference|ScaleCalculationMode)'>"; then
		echo "the demo uses deprecated names"
		return 1
	fi
}

broken=()
for name in "${@:-newest floor}"; do for each in $name; do
	echo "== $each versions"
	if [ "$each" = floor ]; then
		"${PYTHON:-python3}" .ci/versions.py floor > "$work/floor.txt"
		try floor -c "$work/floor.txt" || broken+=(floor)
	else
		if is_newest; then
			check .venv/bin || broken+=(newest)
		else
			try newest || broken+=(newest)
		fi
	fi
	rm -rf "${work:?}/$each"
done; done

for each in ${broken[@]+"${broken[@]}"}; do
	echo
	echo "##############################################################################"
	echo "##  BROKEN with the $each versions of the dependencies: see above."
	echo "##############################################################################"
done
exit 0
