# Debian's packages, unpacked into a folder and not installed. To be sourced; the scripts that
# bring guests and QEMU share it.
#
#   debian_sources WORK SUITE...   apt for these suites of the archive that this machine uses
#   apt-cache, apt-get             ask it, or download: into WORK/archives
#   debian_unpack WORK FOLDER      unpack what was downloaded
#
# apt gets a state of its own in the folder WORK, so neither the system's packages nor its lists
# change, and root is not needed.

debian_keyring=/usr/share/keyrings/debian-archive-keyring.gpg

say() { echo "${0##*/}: $*"; }
die() { echo "${0##*/}: $*" >&2; exit 1; }

# A value of os-release; empty where there is none.
system_says() { (. /etc/os-release 2>/dev/null && echo "${!1:-}"); }

debian_codename() { system_says VERSION_CODENAME; }

# The archive that this machine uses for its own Debian, so that a mirror of its own is used here, too.
debian_archive() {
    local codename files
    codename=$(debian_codename)
    [ -n "$codename" ] || return 1
    shopt -s nullglob
    files=(/etc/apt/sources.list.d/*.sources)
    [ ${#files[@]} = 0 ] || awk -v suite="$codename" '
        function done_with() { if (address != "" && fits) print address; address = ""; fits = 0 }
        FNR == 1 || /^[ \t]*$/ { done_with() }
        tolower($1) == "uris:" { address = $2 }
        tolower($1) == "suites:" { for (i = 2; i <= NF; i++) fits = fits || $i == suite }
        END { done_with() }' "${files[@]}"
    files=(/etc/apt/sources.list.d/*.list)
    [ ! -f /etc/apt/sources.list ] || files+=(/etc/apt/sources.list)
    [ ${#files[@]} = 0 ] || sed -E 's/^deb[ \t]+\[[^]]*\]/deb/' "${files[@]}" |
        awk -v suite="$codename" '$1 == "deb" && $3 == suite { print $2 }'
}

debian_sources() {
    local work=$1 address tool
    shift
    [ "$(system_says ID)" = debian ] || die "needs Debian for amd64, and this is '$(system_says PRETTY_NAME)'"
    for tool in apt-get apt-cache apt-config dpkg; do
        command -v "$tool" >/dev/null || die "needs $tool, which is not in PATH"
    done
    [ "$(dpkg --print-architecture)" = amd64 ] ||
        die "needs Debian for amd64, and this is for $(dpkg --print-architecture)"
    [ -f "$debian_keyring" ] || die "needs $debian_keyring: install debian-archive-keyring"
    address=$(debian_archive | sed -n 1p)
    [ -n "$address" ] || die "no Debian archive is named in /etc/apt/sources.list or /etc/apt/sources.list.d"

    mkdir -p "$work"/{sources,none,lists/partial,archives/partial}
    : >"$work/status"
    cat >"$work/sources/debian.sources" <<SOURCES
Types: deb
URIs: $address
Suites: $*
Components: main
Architectures: amd64
Signed-By: $debian_keyring
SOURCES
    # Of the machine's configuration only how to reach an archive counts: its hooks work on the system.
    {
        apt-config dump | grep -E '^Acquire::(http|https|Retries|Check-|ForceIPv)' || true
        cat <<CONFIG
Dir::Etc::Main "/dev/null";
Dir::Etc::Parts "$work/none";
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "$work/sources";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "$work/none";
Dir::State "$work";
Dir::State::Lists "$work/lists";
Dir::State::status "$work/status";
Dir::Cache "$work";
Dir::Cache::Archives "$work/archives";
Dir::Cache::pkgcache "";
Dir::Cache::srcpkgcache "";
APT::Architecture "amd64";
APT::Architectures { "amd64"; };
APT::Sandbox::User "root";
Acquire::Languages "none";
CONFIG
    } >"$work/apt.conf"
    export APT_CONFIG=$work/apt.conf
    say "downloads from $address, suites $*"
    apt-get update -qq || die "$address: the lists of $* cannot be had"
}

debian_unpack() {
    local package
    mkdir -p "$2"
    for package in "$1"/archives/*.deb; do
        dpkg -x "$package" "$2"
    done
}
