"""Names that mean something already, in the languages of the emitters."""

__all__ = [
    "C_LOCALS",
    "C_WORDS",
    "HEADER_NAMES",
    "INCLUDE_NAMES",
    "RUST_LOCALS",
    "RUST_TYPES",
    "RUST_WORDS",
]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


C_WORDS: frozenset[str] = _words(
    """
    alignas alignof and and_eq asm atomic_cancel atomic_commit atomic_noexcept auto bitand bitor
    bool break case catch char char16_t char32_t char8_t class co_await co_return co_yield compl
    concept const const_cast consteval constexpr constinit continue decltype default delete do
    double dynamic_cast else enum explicit export extern false float for friend goto if inline int
    long mutable namespace new noexcept not not_eq nullptr operator or or_eq private protected
    public reflexpr register reinterpret_cast requires restrict return short signed sizeof static
    static_assert static_cast struct switch synchronized template this thread_local throw true try
    typedef typeid typename typeof typeof_unqual union unsigned using virtual void volatile wchar_t
    while xor xor_eq
    current errno far hyper huge i386 interface linux near pascal cdecl small stderr stdin stdout
    unix
    size_t ptrdiff_t uintptr_t intptr_t int8_t int16_t int32_t int64_t uint8_t uint16_t uint32_t
    uint64_t
    """
)
"""Keywords of C23 and C++23; macros without arguments of compilers (`linux`), of Linux (`current`)
and of Windows (`small`); the types that a function names."""

C_LOCALS: frozenset[str] = frozenset({"call", "caller", "result", "status"})
"""What a function calls its own."""

RUST_WORDS: frozenset[str] = _words(
    """
    abstract as async await become box break const continue crate do dyn else enum extern false
    final fn for gen if impl in let loop macro match mod move mut override priv pub ref return self
    Self static struct super trait true try type typeof union unsafe unsized use virtual where
    while yield _
    """
)
"""Keywords of every edition, also those that are kept for later."""

RUST_TYPES: frozenset[str] = _words(
    """
    bool char core f32 f64 i8 i16 i32 i64 i128 isize str u8 u16 u32 u64 u128 usize
    """
)
"""What a module of this name would hide: the primitive types, and the crate `core`."""

RUST_LOCALS: frozenset[str] = _words(
    """
    C Caller Err Error Method Named None Ok Option Response Result Some Word asm caller code given
    method named room values words
    """
)
"""What every module and every function has already."""

HEADER_NAMES: frozenset[str] = _words(
    """
    VMIBRIDGE_ABORT VMIBRIDGE_ADDRESS VMIBRIDGE_ANSWERED VMIBRIDGE_ASM_CPUID
    VMIBRIDGE_ASM_VMCALL VMIBRIDGE_ASM_VMMCALL VMIBRIDGE_CONTINUE VMIBRIDGE_CPUID VMIBRIDGE_ENUM
    VMIBRIDGE_FEATURE VMIBRIDGE_FEATURE_POLICY VMIBRIDGE_FEATURE_QUOTA VMIBRIDGE_FEATURE_WAIT
    VMIBRIDGE_H VMIBRIDGE_HOST VMIBRIDGE_HOST_DEADLINES VMIBRIDGE_HOST_ECHO_HIGH
    VMIBRIDGE_HOST_ECHO_LOW VMIBRIDGE_HOST_LIMITS VMIBRIDGE_HOST_VERSION VMIBRIDGE_KIND_ABORTED
    VMIBRIDGE_KIND_FAILED VMIBRIDGE_KIND_INVALID_PARAMETERS VMIBRIDGE_KIND_SUCCESS
    VMIBRIDGE_KIND_TOUCH VMIBRIDGE_KIND_WAITING VMIBRIDGE_LIMIT VMIBRIDGE_LIMIT_ACCESS
    VMIBRIDGE_LIMIT_IN_FLIGHT VMIBRIDGE_LIMIT_RESULT_TIMEOUT VMIBRIDGE_MAGIC VMIBRIDGE_NOBODY
    VMIBRIDGE_NOT_ANSWERED VMIBRIDGE_NO_END VMIBRIDGE_NO_ROOM VMIBRIDGE_STAMP3 VMIBRIDGE_STAMP4
    VMIBRIDGE_STATUS_WAITING VMIBRIDGE_TRAP VMIBRIDGE_VERSION_MAJOR VMIBRIDGE_VMCALL
    VMIBRIDGE_VMMCALL VMIBRIDGE_WAIT VMIBRIDGE_WAITING VMIBRIDGE_WORD_BYTES
    VMIBRIDGE_WORD_NUMBER VMIBRIDGE_WORD_ROOM VMIBRIDGE_WORD_TEXT VMIBRIDGE_WORD_TEXT16
    vmibridge_ask vmibridge_ask_by vmibridge_ask_host vmibridge_ask_host_by vmibridge_begin_call
    vmibridge_buffer_size vmibridge_by vmibridge_call vmibridge_call_method
    vmibridge_call_stamped vmibridge_caller vmibridge_char16 vmibridge_code_of vmibridge_copy
    vmibridge_deadlines vmibridge_deadlines_by vmibridge_echo vmibridge_handshake
    vmibridge_handshake_by vmibridge_how vmibridge_kind vmibridge_kind_of vmibridge_lend
    vmibridge_limit vmibridge_limit_by vmibridge_method_call vmibridge_native_of
    vmibridge_packet vmibridge_pause vmibridge_response vmibridge_result vmibridge_retry
    vmibridge_self_test vmibridge_self_test_by vmibridge_send vmibridge_stamped vmibridge_status
    vmibridge_take_back vmibridge_touch vmibridge_touch_buffers vmibridge_touch_pages
    vmibridge_touch_text vmibridge_verified vmibridge_word
    """
)
"""What `vmibridge.h` defines: a test holds it to that."""

INCLUDE_NAMES: frozenset[str] = _words(
    """
    BRIDGE_ABORT BRIDGE_ASK_METHOD BRIDGE_ASK_PLAIN BRIDGE_CALL BRIDGE_CHECK_STAMPS
    BRIDGE_CONTINUE BRIDGE_CPUID BRIDGE_ECHO_ BRIDGE_FEATURE_POLICY BRIDGE_FEATURE_QUOTA
    BRIDGE_FEATURE_WAIT BRIDGE_GATE BRIDGE_GATE_INC BRIDGE_HANDSHAKE BRIDGE_HOST
    BRIDGE_HOST_DEADLINES BRIDGE_HOST_ECHO_HIGH BRIDGE_HOST_ECHO_LOW BRIDGE_HOST_LIMITS
    BRIDGE_HOST_VERSION BRIDGE_INC BRIDGE_KIND_ABORTED BRIDGE_KIND_FAILED
    BRIDGE_KIND_INVALID_PARAMETERS BRIDGE_KIND_SUCCESS BRIDGE_KIND_TOUCH BRIDGE_KIND_WAITING
    BRIDGE_LIMIT BRIDGE_LIMIT_ACCESS BRIDGE_LIMIT_IN_FLIGHT BRIDGE_LIMIT_RESULT_TIMEOUT
    BRIDGE_MAGIC BRIDGE_METHODS_INC BRIDGE_NOT_ANSWERED BRIDGE_NO_END
    BRIDGE_PATTERN1 BRIDGE_PATTERN2 BRIDGE_PATTERN3 BRIDGE_PATTERN4 BRIDGE_PAUSE
    BRIDGE_PUSH_WORD BRIDGE_SELF_TEST BRIDGE_SLEEP BRIDGE_STAMP3 BRIDGE_STAMP4 BRIDGE_TOUCH_WORD
    BRIDGE_VERSION_MAJOR BRIDGE_VMCALL BRIDGE_VMMCALL BRIDGE_WAIT BRIDGE_WORD_BYTES
    BRIDGE_WORD_NUMBER BRIDGE_WORD_ROOM BRIDGE_WORD_TEXT BRIDGE_WORD_TEXT16
    """
)
"""What the includes for nasm define: a test holds it to those."""
