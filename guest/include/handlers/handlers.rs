//! Made by `vmibridge guest-header` of the handlers below: change those, and make it again.
//!
//! A module of a crate, with `no_std` or without: `mod handlers;`. A handler is a module, a method a
//! function, whose first argument says how it is called: `Way::Cpuid`, or a `Caller` of your own,
//! which may sleep by the means of its system, or send a request in another way.
//!
//! CPUID does no harm where there is no host. VMCALL and VMMCALL may be undefined there. So begin
//! with `handshake(&Way::Cpuid)`.
#![allow(dead_code, unused_imports, unused_unsafe, unsafe_op_in_unsafe_fn, clippy::all)]
// Names are those that the handlers have.
#![allow(non_camel_case_types, non_snake_case, non_upper_case_globals)]

use core::arch::asm;

pub const MAGIC: u32 = 0x4249_4d56;
pub const STAMP3: u64 = 0x2133_5352_2d49_4d56;
pub const STAMP4: u64 = 0x2134_5352_2d49_4d56;
/// What this file is written for.
pub const VERSION_MAJOR: u32 = 1;

/// What a register of a value holds.
pub type Word = usize;

/// A request. Where the form has no register for a value, the host sees 0.
#[derive(Clone, Copy, Debug)]
pub struct Packet {
    pub magic: u32,
    pub request: u16,
    pub method: u16,
    pub values: [Word; 4],
}

/// value1 to value4 of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Response {
    pub values: [Word; 4],
}

/// Why there is no result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The stamps are missing: there is no host, no handler for the request, a policy denies it, or
    /// the handler failed or took too long.
    NotAnswered,
    /// A text that was given does not end with a NUL.
    NotTerminated,
    /// The host says so.
    Status(Status),
}

/// An encoded status, without its stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u64);

impl Status {
    /// The last attempt, too, was told to wait.
    pub const WAITING: u8 = 0x01;
    /// A page is not present however often it is touched.
    pub const TOUCH: u8 = 0x02;
    /// The code is the number of the parameter, from 1.
    pub const INVALID_PARAMETERS: u8 = 0xfd;
    /// The code is the method's own.
    pub const FAILED: u8 = 0xfe;
    pub const ABORTED: u8 = 0xff;

    /// One of the above, or one that a newer host has.
    pub const fn kind(self) -> u8 {
        (self.0 >> 8) as u8
    }

    pub const fn code(self) -> u8 {
        (self.0 >> 16) as u8
    }

    /// An NTSTATUS, an HRESULT or an errno; 0 in 32-bit code.
    pub const fn native(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// How requests reach the host.
pub trait Caller {
    /// Send one request, and return what is in the registers then.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    unsafe fn send(&self, packet: &Packet) -> Response;

    /// How many values a request has in 32-bit code: 4, and 2 of a hypercall.
    fn values(&self) -> usize {
        4
    }

    /// What to do before a request is sent again, which the host was not ready for.
    fn sleep(&self) {
        for _ in 0..200_000 {
            core::hint::spin_loop();
        }
    }

    /// How often a request is sent at the most while the host tells to wait; 0: without end.
    fn attempts(&self) -> u32 {
        0
    }
}

/// The instruction that a request is sent by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    Cpuid,
    Vmcall,
    Vmmcall,
}

impl Caller for Way {
    #[inline]
    unsafe fn send(&self, packet: &Packet) -> Response {
        unsafe { trap(*self, packet) }
    }

    #[inline]
    fn values(&self) -> usize {
        if *self == Way::Cpuid {
            4
        } else {
            2
        }
    }
}

#[cfg(target_arch = "x86_64")]
unsafe fn trap(way: Way, packet: &Packet) -> Response {
    let code = u64::from(packet.request) | u64::from(packet.method) << 16;
    let magic = u64::from(packet.magic);
    let (mut a, b): (u64, u64);
    let (mut c, mut d) = match way {
        Way::Cpuid => (code, 0),
        _ => (magic, code),
    };
    a = if way == Way::Cpuid { magic } else { 0x22 };
    // rbx is the compiler's own. A hypercall has the signature of Xen's guest request, too.
    macro_rules! by {
        ($instruction:literal) => {
            asm!(
                "mov {b}, rbx", $instruction, "xchg {b}, rbx",
                b = out(reg) b, inout("rax") a, inout("rcx") c, inout("rdx") d,
                in("rdi") 0x18_u64, in("rsi") 0_u64,
                in("r8") packet.values[0], in("r9") packet.values[1],
                in("r10") packet.values[2], in("r11") packet.values[3],
            )
        };
    }
    unsafe {
        match way {
            Way::Cpuid => by!("cpuid"),
            Way::Vmcall => by!(".byte 0x0f, 0x01, 0xc1"),
            Way::Vmmcall => by!(".byte 0x0f, 0x01, 0xd9"),
        }
    }
    Response {
        values: [a as Word, b as Word, c as Word, d as Word],
    }
}

#[cfg(target_arch = "x86")]
unsafe fn trap(way: Way, packet: &Packet) -> Response {
    let code = u32::from(packet.request) | u32::from(packet.method) << 16;
    let [value1, value2, value3, value4] = packet.values.map(|value| value as u32);
    // eax, ebx, ecx, edx, esi, edi, ebp: all are in use, and some are the compiler's own.
    let mut registers: [u32; 7] = match way {
        Way::Cpuid => [packet.magic, value1, code, value2, value3, value4, 0],
        _ => [0x22, 0x18, 0, code, value1, value2, packet.magic],
    };
    macro_rules! by {
        ($instruction:literal) => {
            asm!(
                "push ebx", "push ebp", "push esi", "push edi", "push eax",
                "mov ebx, [eax + 4]", "mov ecx, [eax + 8]", "mov edx, [eax + 12]",
                "mov esi, [eax + 16]", "mov edi, [eax + 20]", "mov ebp, [eax + 24]",
                "mov eax, [eax]", $instruction, "pop ebp",
                "mov [ebp], eax", "mov [ebp + 4], ebx", "mov [ebp + 8], ecx",
                "mov [ebp + 12], edx", "pop edi", "pop esi", "pop ebp", "pop ebx",
                inout("eax") registers.as_mut_ptr() => _, out("ecx") _, out("edx") _,
            )
        };
    }
    unsafe {
        match way {
            Way::Cpuid => by!("cpuid"),
            Way::Vmcall => by!(".byte 0x0f, 0x01, 0xc1"),
            Way::Vmmcall => by!(".byte 0x0f, 0x01, 0xd9"),
        }
    }
    let [a, b, c, d, ..] = registers.map(|register| register as Word);
    Response { values: [a, b, c, d] }
}

/// The version of the host and its features, if there is one of our major version.
pub fn handshake<C: Caller + ?Sized>(caller: &C) -> Option<(u32, u32)> {
    let packet = Packet { magic: MAGIC, request: 0, method: 1, values: [0; 4] };
    // It names no memory.
    let [version, features, third, fourth] = unsafe { caller.send(&packet) }.values;
    let stamped = third == STAMP3 as Word && fourth == STAMP4 as Word;
    (stamped && version as u32 >> 16 == VERSION_MAJOR).then(|| (version as u32, features as u32))
}

/// A word that names memory.
#[derive(Clone, Copy)]
enum Named {
    /// A number, or no memory.
    Nothing,
    /// Memory to read, of so many bytes.
    Read(usize),
    /// Memory to fill, of so many bytes.
    Fill(usize),
}

/// What a method is called by.
struct Method {
    magic: u32,
    request: u16,
    method: u16,
    stamps: [Option<u64>; 4],
    /// How many words; where a word is wider than 32 bits, 32-bit code has them in memory.
    words: usize,
    is_wide: bool,
}

/// The result, then the words: for a 32-bit form, memory of the host's.
type Block = [u64; 5];

fn stamped(stamps: &[Option<u64>; 4], response: &Response) -> bool {
    let mut pairs = stamps.iter().zip(&response.values);
    pairs.all(|(stamp, value)| stamp.map_or(true, |stamp| stamp as Word == *value))
}

/// Touch every page of memory, and return how many that are.
///
/// # Safety
///
/// The memory is there: to be read, or to be written.
unsafe fn touch(address: usize, size: usize, for_writing: bool) -> u32 {
    let mut pages = 0;
    let mut at = address;
    while at < address + size {
        let byte = at as *mut u8;
        unsafe {
            if for_writing {
                // A write that changes nothing, also when others write there.
                asm!("lock or byte ptr [{}], 0", in(reg) byte);
            } else {
                byte.read_volatile();
            }
        }
        pages += 1;
        at = (at | 4095) + 1;
    }
    pages
}

/// Send a request until it is answered: again while the host tells to wait, and again, a bounded
/// number of times, when it finds a page that is not present.
///
/// # Safety
///
/// What the words name is memory as `named` says.
unsafe fn call<C: Caller + ?Sized>(
    caller: &C,
    method: &Method,
    words: [u64; 4],
    named: [Named; 4],
) -> Result<u64, Error> {
    let mut block: Block = [0, words[0], words[1], words[2], words[3]];
    let at = block.as_mut_ptr();
    let in_block = cfg!(target_arch = "x86") && (method.is_wide || method.words > caller.values());
    let values = if in_block { [at as Word, 0, 0, 0] } else { words.map(|word| word as Word) };
    let Method { magic, request, method: code, .. } = *method;
    let packet = Packet { magic, request, method: code, values };
    let (mut attempts, mut touches) = (0_u32, 0_u32);
    loop {
        let response = unsafe { caller.send(&packet) };
        if !stamped(&method.stamps, &response) {
            return Err(Error::NotAnswered);
        }
        let status = Status(response.values[0] as u64 & !0xff00_00ff);
        match status.kind() {
            _ if status.0 == 0 && in_block => return Ok(unsafe { at.read_volatile() }),
            _ if status.0 == 0 => return Ok(response.values[1] as u64),
            Status::WAITING => {
                attempts = attempts.wrapping_add(1);
                if attempts == caller.attempts() {
                    return Err(Error::Status(Status(u64::from(Status::WAITING) << 8)));
                }
                caller.sleep();
            }
            Status::TOUCH => {
                // Once is enough, but where the system takes pages away in the meantime.
                let mut pages = unsafe { touch(at as usize, 40, true) };
                for (word, named) in words.iter().zip(named) {
                    pages += match named {
                        Named::Read(size) => unsafe { touch(*word as usize, size, false) },
                        Named::Fill(size) => unsafe { touch(*word as usize, size, true) },
                        Named::Nothing => 0,
                    };
                }
                if touches >= pages + 8 {
                    return Err(Error::Status(status));
                }
                touches += 1;
            }
            _ => return Err(Error::Status(status)),
        }
    }
}

/// Send four values as they are, again while value1 of the answer is what tells to wait.
///
/// # Safety
///
/// The host may read and write memory that the values name.
unsafe fn call_plain<C: Caller + ?Sized>(
    caller: &C,
    method: &Method,
    values: [Word; 4],
    wait: Option<u32>,
) -> Result<Response, Error> {
    let Method { magic, request, method: code, .. } = *method;
    let packet = Packet { magic, request, method: code, values };
    let mut attempts = 0_u32;
    loop {
        let response = unsafe { caller.send(&packet) };
        if !stamped(&method.stamps, &response) {
            return Err(Error::NotAnswered);
        }
        if wait != Some(response.values[0] as u32) {
            return Ok(response);
        }
        attempts = attempts.wrapping_add(1);
        if attempts == caller.attempts() {
            return Err(Error::Status(Status(u64::from(Status::WAITING) << 8)));
        }
        caller.sleep();
    }
}

/// How many bytes a text has, with its NUL.
fn text_size<T: Copy + Into<u32>>(text: &[T]) -> Result<usize, Error> {
    let end = text.iter().position(|unit| (*unit).into() == 0);
    end.map(|end| (end + 1) * core::mem::size_of::<T>()).ok_or(Error::NotTerminated)
}

/// clock: request 0x0114.
///
/// Tells the time; the nanoseconds are its output.
pub mod clock {
    use super::{Caller, Error, Method, Named, Response, Word};

    pub const REQUEST: u16 = 0x0114;
    pub const MAGIC: u32 = 0x42494d56;
    pub const METHOD_REAL: u16 = 0x0001;
    pub const METHOD_MONOTONIC: u16 = 0x0002;

    /// The time of day, in nanoseconds since the Unix epoch.
    ///
    /// * gives a number, 64 bits.
    pub fn real<C: Caller + ?Sized>(
        caller: &C,
    ) -> Result<u64, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_REAL,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: true,
        };
        let words = [0, 0, 0, 0];
        let named = [Named::Nothing, Named::Nothing, Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u64)
    }

    /// A time that never goes back, in nanoseconds.
    ///
    /// * gives a number, 64 bits.
    pub fn monotonic<C: Caller + ?Sized>(
        caller: &C,
    ) -> Result<u64, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_MONOTONIC,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: true,
        };
        let words = [0, 0, 0, 0];
        let named = [Named::Nothing, Named::Nothing, Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u64)
    }
}

/// deploy: request 0x0011.
///
/// Opens the gates of its settings. Its output is the status of a guest that is done.
///
/// A class that derives from it may open them otherwise: by `may_download` and `may_execute`.
///
/// Say when a guest of vmi-rs may download and execute what it brings: its deploy, bit for bit.
///
///     [handlers.deploy]
///     download = "continue"
///     execute = "continue"
///     execute_after = "/run/lab/snapshot-taken"
///
/// | method | value1 | value2 | value1 of the answer |
/// |---|---|---|---|
/// | 0x0001 DOWNLOAD | attempt | HRESULT of the attempt before | a gate |
/// | 0x0002 EXECUTE | | | a gate |
/// | 0xffff EXIT | encoded status | native code | left alone |
///
/// A gate is CONTINUE, WAIT or ABORT; on WAIT the guest sleeps and asks again, without end. Attempt 0
/// asks whether the host is ready, and is sent also where there is nothing to download. An attempt
/// above 0 comes after a download that failed.
///
/// The handler keeps nothing of a guest: while a guest asks again and again, one host may take over
/// from another, and goes on where that one was.
pub mod deploy {
    use super::{Caller, Error, Method, Named, Response, Word};

    pub const REQUEST: u16 = 0x0011;
    pub const MAGIC: u32 = 0x42494d56;
    pub const METHOD_DOWNLOAD: u16 = 0x0001;
    pub const METHOD_EXECUTE: u16 = 0x0002;
    pub const METHOD_EXIT: u16 = 0xffff;

    /// Whether the guest may download.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn download<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_DOWNLOAD,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x1)) }
    }

    /// Whether the guest may execute.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn execute<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_EXECUTE,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x1)) }
    }

    /// The guest is done.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn exit<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_EXIT,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x1)) }
    }
}

/// environment: request 0x0022.
///
/// Hands out the values that its settings list, and no others.
///
/// Its output is the name that was asked for, never the value, which may be a secret;
/// there is none when nothing was handed out.
///
/// Hand named values to the guest: configuration, tokens, variables of the host.
///
/// | 0x0001 GET | in | out |
/// |---|---|---|
/// | value1 | address of a name: UTF-8, at most 256 bytes, then a NUL | status |
/// | value2 | address of a buffer for the value | length of the value in bytes |
/// | value3 | capacity of the buffer in bytes; 0 stands for 256 | |
///
/// The value goes into the buffer with a NUL behind it, which its length does not count.
///
/// | status | when |
/// |---|---|
/// | invalid parameters | a name that is too long, no UTF-8 or not readable |
/// | | a buffer that is not writable |
/// | failed, native ENOENT | a name that is not handed out, whether the host has it or not |
/// | failed, native ERANGE | the buffer is too small: value2 is the capacity that it takes |
///
/// The native code is in the upper half of the status, which an x86 guest does not see; it
/// can tell the two failures by value2, which is 0 for the first.
pub mod environment {
    use super::{Caller, Error, Method, Named, Response, Word};

    pub const REQUEST: u16 = 0x0022;
    pub const MAGIC: u32 = 0x42494d56;
    pub const METHOD_GET: u16 = 0x0001;

    /// Write the value of a name into a buffer of the guest.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn get<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_GET,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x100)) }
    }
}

/// exec_gate: request 0x0113.
///
/// Asks a service or a person. Raises `MissingExtraError` for a webhook without httpcore.
///
/// Let the host decide whether the guest may go on with what it is about to run.
///
///     [handlers.exec_gate]
///     folder = "questions"     # or webhook = "https://policy.example/ask"
///     default = "abort"        # where nobody answers
///
/// | 0x0001 ASK | in | out |
/// |---|---|---|
/// | value1 | address of the command: UTF-8, at most 4096 bytes, then a NUL | a code of the gate |
/// | value2 | | why: 0 decided, 1 nobody answered, 2 too many questions, 3 no command |
///
/// A code is `Gate.CONTINUE` (0) or `Gate.ABORT` (0xffffffff). While the host is asked, the guest gets
/// `Gate.WAIT` (1), and sends its request again. What is wrong with a request is an ABORT. A guest
/// looks at the stamps before anything else: without them there was no host.
///
/// Invariants:
///
/// - Nobody answers in time, or in a form that is known: the default.
/// - The questions under way are bounded: a guest floods neither a service nor a person.
/// - Who is asked is asked by `vmi.outside`: a replay gives the recorded answer.
pub mod exec_gate {
    use super::{Caller, Error, Method, Named, Response, Word};

    pub const REQUEST: u16 = 0x0113;
    pub const MAGIC: u32 = 0x42494d56;
    pub const METHOD_ASK: u16 = 0x0001;

    /// Ask whether a command may run.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn ask<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_ASK,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x1)) }
    }
}

/// exit: request 0x0111.
///
/// Gives what the guest exits with to the consumer of the outcomes.
pub mod exit {
    use super::{Caller, Error, Method, Named, Response, Word};

    pub const REQUEST: u16 = 0x0111;
    pub const MAGIC: u32 = 0x42494d56;
    pub const METHOD_EXIT: u16 = 0xffff;
    pub const EXIT_REASON_LIMIT: usize = 1024;

    /// End the run with a status, and a reason in words.
    ///
    /// * `status`: a number, 32 bits.
    /// * `reason`: UTF-8, at most 1024 bytes, then a NUL. Or none, at address 0.
    pub fn exit<C: Caller + ?Sized>(
        caller: &C,
        status: u32,
        reason: Option<&[u8]>,
    ) -> Result<(), Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_EXIT,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 2,
            is_wide: false,
        };
        let reason_size = reason.map_or(Ok(0), super::text_size)?;
        let words = [status as u64, reason.map_or(core::ptr::null::<u8>(), |data| data.as_ptr()) as usize as u64, 0, 0];
        let named = [Named::Nothing, Named::Read(reason_size), Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        unsafe { super::call(caller, &method, words, named) }.map(|_| ())
    }
}

/// fetch: request 0x0023.
///
/// Streams allowed URLs into the guest. The output of READ is the bytes written.
///
/// Uses no proxy, sends no credentials, and trusts the certificates that the system
/// trusts (`SSL_CERT_FILE` adds others). Raises `MissingExtraError` without httpcore.
///
/// Let the guest download what the host allows: GET over HTTP and HTTPS, in pieces.
///
///     [handlers.fetch]
///     allow = ["https://example.com/tools", "http://192.168.0.2:8000"]
///
/// | method | value1 in | value2 in | value3 in | value2 out |
/// |---|---|---|---|---|
/// | 0x0001 OPEN | address of a URL: at most 2048 bytes, then a NUL | | | handle, 1 to 4095 |
/// | 0x0002 READ | handle | address of a buffer | its capacity in bytes | bytes written, 0: the end |
/// | 0x0003 CLOSE | handle | | | 0 |
/// | 0x0004 LENGTH | handle | | | length of the content in bytes, 2**64-1: not known |
///
/// value1 of the answer is the status. A capacity is at most 64 KiB; 0 stands for 4096. READ
/// waits for the next piece only, and may fill less than the buffer.
///
/// | status | native | when |
/// |---|---|---|
/// | invalid parameters | | a URL or a buffer that is not accessible, a capacity over 64 KiB |
/// | | | a handle that is not open, or that another address space opened |
/// | failed | EACCES | the URL, a redirect or an address that it leads to is not allowed |
/// | failed | EMFILE | as many handles are open as may be |
/// | failed, code 1 | the HTTP status | the server answered other than 200 |
/// | failed | EIO | the network failed, or the body ended too early |
/// | failed | EFBIG | the content is longer than may be |
/// | failed | EBUSY | another vCPU reads from this handle right now |
///
/// The native code is in the upper half of the status, which an x86 guest does not see.
///
/// Invariants:
///
/// - Only URLs on the list are asked for. Each redirect is held against it like the first URL.
/// - A host's addresses are looked up and checked here, all of them, and a connection goes to
///   an address that was checked. So a name that changes its address gets nowhere.
/// - A READ that fails, or that its deadline cuts off, ends the transfer and frees its handle;
///   with invalid parameters nothing is lost, and it can be repeated.
/// - A handle that was not used for a while is taken back when the next one is opened.
///
/// Its methods take the packet, and not typed parameters, since guests rely on what is answered. A
/// typed method would have the number of the wrong parameter in the code of *invalid parameters*, and
/// would answer *touch* where a page is not present. READ has three words, which VMCALL of 32-bit code
/// would have to put into a block of memory, and a default for the third; and a handle that is not open
/// is *invalid parameters* here, which the body of a typed method cannot answer.
pub mod fetch {
    use super::{Caller, Error, Method, Named, Response, Word};

    pub const REQUEST: u16 = 0x0023;
    pub const MAGIC: u32 = 0x42494d56;
    pub const METHOD_OPEN: u16 = 0x0001;
    pub const METHOD_READ: u16 = 0x0002;
    pub const METHOD_CLOSE: u16 = 0x0003;
    pub const METHOD_LENGTH: u16 = 0x0004;

    /// Ask for a URL; answer when the headers are there.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn open<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_OPEN,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x100)) }
    }

    /// Write the next piece of the content into a buffer of the guest.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn read<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_READ,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x100)) }
    }

    /// End a transfer and free its handle.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn close<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_CLOSE,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x100)) }
    }

    /// Tell the length of the content; an x86 guest gets the low 32 bits.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn length<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_LENGTH,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x100)) }
    }
}

/// file_transfer: request 0x0012.
///
/// Keeps the files that guests send. Its output is the name of a file that is there whole, and
/// the status of a guest that is done.
///
/// Take files from guests of vmi-rs: its file transfer, bit for bit.
///
///     [handlers.file_transfer]
///     folder = "/srv/samples"
///
/// | method | value1 | value2 | value3 | value4 | value1 out |
/// |---|---|---|---|---|---|
/// | 0x0001 BEGIN | its own handle | size, signed | address of a name | its bytes | a transfer |
/// | 0x0002 SET_BUFFER | handle | address | | | a gate |
/// | 0x0003 CHUNK | handle | bytes in the buffer | | | a gate |
/// | 0x0004 CLOSE | handle | 0 for success | | | a gate |
/// | 0xffff EXIT | encoded status | native code | | | left alone |
///
/// A transfer is a handle of 1 to 4095, or'ed with the size of a chunk in bytes, 65536, shifted left
/// by 12; 0 rejects. A gate is CONTINUE or ABORT: this guest knows no WAIT, and is never told to.
///
/// Unlike upstream's host it leaves nothing behind of a file that was not closed with success and in
/// its declared size; a file that is there stays as it is, and the other one gets a number in its name;
/// and handles are used again.
pub mod file_transfer {
    use super::{Caller, Error, Method, Named, Response, Word};

    pub const REQUEST: u16 = 0x0012;
    pub const MAGIC: u32 = 0x42494d56;
    pub const METHOD_BEGIN: u16 = 0x0001;
    pub const METHOD_SET_BUFFER: u16 = 0x0002;
    pub const METHOD_CHUNK: u16 = 0x0003;
    pub const METHOD_CLOSE: u16 = 0x0004;
    pub const METHOD_EXIT: u16 = 0xffff;

    /// Begin a file; its size and its name are the guest's.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn begin<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_BEGIN,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x1)) }
    }

    /// Where the guest puts each chunk.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn set_buffer<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_SET_BUFFER,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x1)) }
    }

    /// Take the next bytes out of the guest's buffer; a failure ends the transfer.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn chunk<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_CHUNK,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x1)) }
    }

    /// End a file: it counts if the guest says so, and if it has its size.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn close<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_CLOSE,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x1)) }
    }

    /// The guest is done.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn exit<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_EXIT,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x1)) }
    }
}

/// files: request 0x0110.
///
/// Files between guests and one folder. Its output is what a method gives, or nothing.
pub mod files {
    use super::{Caller, Error, Method, Named, Response, Word};

    pub const REQUEST: u16 = 0x0110;
    pub const MAGIC: u32 = 0x42494d56;
    pub const METHOD_BEGIN: u16 = 0x0001;
    pub const BEGIN_NAME_LIMIT: usize = 4096;
    pub const METHOD_PUT: u16 = 0x0002;
    pub const PUT_DATA_LIMIT: usize = 1048576;
    pub const METHOD_GET: u16 = 0x0003;
    pub const GET_INTO_LIMIT: usize = 1048576;
    pub const METHOD_END: u16 = 0x0004;
    pub const END_SHA256_LIMIT: usize = 32;
    pub const METHOD_ABORT: u16 = 0x0005;
    pub const METHOD_STAT: u16 = 0x0006;
    pub const STAT_NAME_LIMIT: usize = 4096;
    pub const STAT_INTO_LIMIT: usize = 1048576;
    pub const METHOD_LIST: u16 = 0x0007;
    pub const LIST_FOLDER_LIMIT: usize = 4096;
    pub const LIST_AFTER_LIMIT: usize = 4096;
    pub const LIST_INTO_LIMIT: usize = 1048576;
    pub const METHOD_LENGTH: u16 = 0x0008;
    pub const METHOD_BEGIN_UTF16: u16 = 0x0011;
    pub const BEGIN_UTF16_NAME_LIMIT: usize = 4096;
    pub const METHOD_STAT_UTF16: u16 = 0x0016;
    pub const STAT_UTF16_NAME_LIMIT: usize = 4096;
    pub const STAT_UTF16_INTO_LIMIT: usize = 1048576;
    pub const METHOD_LIST_UTF16: u16 = 0x0017;
    pub const LIST_UTF16_FOLDER_LIMIT: usize = 4096;
    pub const LIST_UTF16_AFTER_LIMIT: usize = 4096;
    pub const LIST_UTF16_INTO_LIMIT: usize = 1048576;

    /// What a BEGIN is for: one of the first three, and HASH or not.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Mode(pub u32);

    impl Mode {
        pub const READ: Mode = Mode(1);
        pub const CREATE: Mode = Mode(2);
        pub const REPLACE: Mode = Mode(4);
        pub const HASH: Mode = Mode(8);
    }

    impl core::ops::BitOr for Mode {
        type Output = Mode;
        fn bitor(self, other: Mode) -> Mode {
            Mode(self.0 | other.0)
        }
    }

    /// Begin to put or get a file; gives its handle.
    ///
    /// * `name`: UTF-8, at most 4096 bytes, then a NUL.
    /// * `size`: a number, 64 bits.
    /// * `mode`: of Mode, 32 bits.
    /// * gives a number, 32 bits.
    pub fn begin<C: Caller + ?Sized>(
        caller: &C,
        name: &[u8],
        size: u64,
        mode: Mode,
    ) -> Result<u32, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_BEGIN,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 3,
            is_wide: true,
        };
        let name_size = super::text_size(name)?;
        let words = [name.as_ptr() as usize as u64, size as u64, mode.0 as u64, 0];
        let named = [Named::Read(name_size), Named::Nothing, Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u32)
    }

    /// Write bytes at an offset; gives how many.
    ///
    /// * `handle`: a number, 32 bits.
    /// * `offset`: a number, 64 bits.
    /// * `data`: its length in bytes of it, at most 1048576.
    /// * gives a number, 32 bits.
    pub fn put<C: Caller + ?Sized>(
        caller: &C,
        handle: u32,
        offset: u64,
        data: &[u8],
    ) -> Result<u32, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_PUT,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 4,
            is_wide: true,
        };
        let words = [handle as u64, offset as u64, data.as_ptr() as usize as u64, data.len() as u64];
        let named = [Named::Nothing, Named::Nothing, Named::Read(data.len()), Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u32)
    }

    /// Read bytes at an offset; gives how many, 0 at the end.
    ///
    /// * `handle`: a number, 32 bits.
    /// * `offset`: a number, 64 bits.
    /// * `into`: room to fill, of its length in bytes, at most 1048576.
    /// * gives a number, 32 bits.
    pub fn get<C: Caller + ?Sized>(
        caller: &C,
        handle: u32,
        offset: u64,
        into: &mut [u8],
    ) -> Result<u32, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_GET,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 4,
            is_wide: true,
        };
        let words = [handle as u64, offset as u64, into.as_mut_ptr() as usize as u64, into.len() as u64];
        let named = [Named::Nothing, Named::Nothing, Named::Fill(into.len()), Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u32)
    }

    /// Check a file, and give it its name if it was put.
    ///
    /// * `handle`: a number, 32 bits.
    /// * `sha256`: its length in bytes of it, at most 32. Or none, at address 0.
    pub fn end<C: Caller + ?Sized>(
        caller: &C,
        handle: u32,
        sha256: Option<&[u8]>,
    ) -> Result<(), Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_END,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 3,
            is_wide: false,
        };
        let words = [handle as u64, sha256.map_or(core::ptr::null::<u8>(), |data| data.as_ptr()) as usize as u64, sha256.map_or(0, |data| data.len()) as u64, 0];
        let named = [Named::Nothing, Named::Read(sha256.map_or(0, |data| data.len())), Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        unsafe { super::call(caller, &method, words, named) }.map(|_| ())
    }

    /// End a transfer; nothing is left of a file that was put.
    ///
    /// * `handle`: a number, 32 bits.
    pub fn abort<C: Caller + ?Sized>(
        caller: &C,
        handle: u32,
    ) -> Result<(), Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_ABORT,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 1,
            is_wide: false,
        };
        let words = [handle as u64, 0, 0, 0];
        let named = [Named::Nothing, Named::Nothing, Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        unsafe { super::call(caller, &method, words, named) }.map(|_| ())
    }

    /// Look up a file or a folder; gives its size in bytes.
    ///
    /// * `name`: UTF-8, at most 4096 bytes, then a NUL.
    /// * `into`: room to fill, of its length in bytes, at most 1048576. Or none, at address 0.
    /// * gives a number, 64 bits.
    pub fn stat<C: Caller + ?Sized>(
        caller: &C,
        name: &[u8],
        into: Option<&mut [u8]>,
    ) -> Result<u64, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_STAT,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 3,
            is_wide: true,
        };
        let name_size = super::text_size(name)?;
        let mut into = into;
        let words = [name.as_ptr() as usize as u64, into.as_mut().map_or(core::ptr::null_mut::<u8>(), |room| room.as_mut_ptr()) as usize as u64, into.as_ref().map_or(0, |room| room.len()) as u64, 0];
        let named = [Named::Read(name_size), Named::Fill(into.as_ref().map_or(0, |room| room.len())), Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u64)
    }

    /// List a folder in the order of names; gives the bytes of the entries, 0 at the end.
    ///
    /// * `folder`: UTF-8, at most 4096 bytes, then a NUL.
    /// * `after`: UTF-8, at most 4096 bytes, then a NUL. Or none, at address 0.
    /// * `into`: room to fill, of its length in bytes, at most 1048576.
    /// * gives a number, 32 bits.
    pub fn list<C: Caller + ?Sized>(
        caller: &C,
        folder: &[u8],
        after: Option<&[u8]>,
        into: &mut [u8],
    ) -> Result<u32, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_LIST,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 4,
            is_wide: false,
        };
        let folder_size = super::text_size(folder)?;
        let after_size = after.map_or(Ok(0), super::text_size)?;
        let words = [folder.as_ptr() as usize as u64, after.map_or(core::ptr::null::<u8>(), |data| data.as_ptr()) as usize as u64, into.as_mut_ptr() as usize as u64, into.len() as u64];
        let named = [Named::Read(folder_size), Named::Read(after_size), Named::Fill(into.len()), Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u32)
    }

    /// Bytes of a file that are there from its beginning on: go on putting from here.
    ///
    /// * `handle`: a number, 32 bits.
    /// * gives a number, 64 bits.
    pub fn length<C: Caller + ?Sized>(
        caller: &C,
        handle: u32,
    ) -> Result<u64, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_LENGTH,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 1,
            is_wide: true,
        };
        let words = [handle as u64, 0, 0, 0];
        let named = [Named::Nothing, Named::Nothing, Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u64)
    }

    /// The same with a name in UTF-16.
    ///
    /// * `name`: UTF-16, at most 4096 bytes, then a NUL.
    /// * `size`: a number, 64 bits.
    /// * `mode`: of Mode, 32 bits.
    /// * gives a number, 32 bits.
    pub fn begin_utf16<C: Caller + ?Sized>(
        caller: &C,
        name: &[u16],
        size: u64,
        mode: Mode,
    ) -> Result<u32, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_BEGIN_UTF16,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 3,
            is_wide: true,
        };
        let name_size = super::text_size(name)?;
        let words = [name.as_ptr() as usize as u64, size as u64, mode.0 as u64, 0];
        let named = [Named::Read(name_size), Named::Nothing, Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u32)
    }

    /// The same with a name in UTF-16.
    ///
    /// * `name`: UTF-16, at most 4096 bytes, then a NUL.
    /// * `into`: room to fill, of its length in bytes, at most 1048576. Or none, at address 0.
    /// * gives a number, 64 bits.
    pub fn stat_utf16<C: Caller + ?Sized>(
        caller: &C,
        name: &[u16],
        into: Option<&mut [u8]>,
    ) -> Result<u64, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_STAT_UTF16,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 3,
            is_wide: true,
        };
        let name_size = super::text_size(name)?;
        let mut into = into;
        let words = [name.as_ptr() as usize as u64, into.as_mut().map_or(core::ptr::null_mut::<u8>(), |room| room.as_mut_ptr()) as usize as u64, into.as_ref().map_or(0, |room| room.len()) as u64, 0];
        let named = [Named::Read(name_size), Named::Fill(into.as_ref().map_or(0, |room| room.len())), Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u64)
    }

    /// The same with names in UTF-16.
    ///
    /// * `folder`: UTF-16, at most 4096 bytes, then a NUL.
    /// * `after`: UTF-16, at most 4096 bytes, then a NUL. Or none, at address 0.
    /// * `into`: room to fill, of its length in bytes, at most 1048576.
    /// * gives a number, 32 bits.
    pub fn list_utf16<C: Caller + ?Sized>(
        caller: &C,
        folder: &[u16],
        after: Option<&[u16]>,
        into: &mut [u8],
    ) -> Result<u32, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_LIST_UTF16,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 4,
            is_wide: false,
        };
        let folder_size = super::text_size(folder)?;
        let after_size = after.map_or(Ok(0), super::text_size)?;
        let words = [folder.as_ptr() as usize as u64, after.map_or(core::ptr::null::<u16>(), |data| data.as_ptr()) as usize as u64, into.as_mut_ptr() as usize as u64, into.len() as u64];
        let named = [Named::Read(folder_size), Named::Read(after_size), Named::Fill(into.len()), Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u32)
    }
}

/// hello: request 0x0001.
///
/// Answers every method with a greeting, which is also its output.
///
/// Greet the guest: the smallest handler, to try a guest with and to copy from.
///
/// | any method | in | out |
/// |---|---|---|
/// | value1 | address of a name: UTF-8, at most 256 bytes, then a NUL | status |
/// | value2 | address of a buffer for the greeting, or 0 | length of the greeting in bytes |
/// | value3 | capacity of the buffer in bytes; 0 stands for 256 | |
///
/// The greeting goes into the buffer with a NUL behind it, which its length does not count.
///
/// | status | when |
/// |---|---|
/// | invalid parameters | a name that is empty, too long, no UTF-8 or not readable |
/// | | a buffer that is not writable |
/// | failed, native ERANGE | the buffer is too small: value2 is the capacity that it takes |
///
/// The native code is in the upper half of the status, which an x86 guest does not see.
pub mod hello {
    use super::{Caller, Error, Method, Named, Response, Word};

    pub const REQUEST: u16 = 0x0001;
    pub const MAGIC: u32 = 0x42494d56;

    /// Greet by name; see the table of this module.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn call_method<C: Caller + ?Sized>(
        caller: &C,
        code: u16,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: code,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x100)) }
    }
}

/// kv: request 0x0112.
///
/// Keeps values by name. Raises `MissingExtraError` without APSW.
pub mod kv {
    use super::{Caller, Error, Method, Named, Response, Word};

    pub const REQUEST: u16 = 0x0112;
    pub const MAGIC: u32 = 0x42494d56;
    pub const METHOD_GET: u16 = 0x0001;
    pub const GET_NAME_LIMIT: usize = 256;
    pub const GET_INTO_LIMIT: usize = 1048576;
    pub const METHOD_PUT: u16 = 0x0002;
    pub const PUT_NAME_LIMIT: usize = 256;
    pub const PUT_VALUE_LIMIT: usize = 1048576;
    pub const METHOD_DELETE: u16 = 0x0003;
    pub const DELETE_NAME_LIMIT: usize = 256;
    pub const METHOD_NEXT: u16 = 0x0004;
    pub const NEXT_NAME_LIMIT: usize = 256;
    pub const NEXT_INTO_LIMIT: usize = 1048576;
    pub const METHOD_VERSION: u16 = 0x0005;
    pub const VERSION_NAME_LIMIT: usize = 256;
    pub const METHOD_PUT_IF: u16 = 0x0006;
    pub const PUT_IF_NAME_LIMIT: usize = 256;
    pub const PUT_IF_VALUE_LIMIT: usize = 1048576;

    /// Fill a buffer with a value; gives the length of the value in bytes.
    ///
    /// * `name`: UTF-8, at most 256 bytes, then a NUL.
    /// * `into`: room to fill, of its length in bytes, at most 1048576.
    /// * gives a number, 32 bits.
    pub fn get<C: Caller + ?Sized>(
        caller: &C,
        name: &[u8],
        into: &mut [u8],
    ) -> Result<u32, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_GET,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 3,
            is_wide: false,
        };
        let name_size = super::text_size(name)?;
        let words = [name.as_ptr() as usize as u64, into.as_mut_ptr() as usize as u64, into.len() as u64, 0];
        let named = [Named::Read(name_size), Named::Fill(into.len()), Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u32)
    }

    /// Keep a value; gives its version.
    ///
    /// * `name`: UTF-8, at most 256 bytes, then a NUL.
    /// * `value`: its length in bytes of it, at most 1048576.
    /// * gives a number, 64 bits.
    pub fn put<C: Caller + ?Sized>(
        caller: &C,
        name: &[u8],
        value: &[u8],
    ) -> Result<u64, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_PUT,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 3,
            is_wide: true,
        };
        let name_size = super::text_size(name)?;
        let words = [name.as_ptr() as usize as u64, value.as_ptr() as usize as u64, value.len() as u64, 0];
        let named = [Named::Read(name_size), Named::Read(value.len()), Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u64)
    }

    /// Take an entry away; gives whether there was one.
    ///
    /// * `name`: UTF-8, at most 256 bytes, then a NUL.
    /// * gives true or false.
    pub fn delete<C: Caller + ?Sized>(
        caller: &C,
        name: &[u8],
    ) -> Result<bool, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_DELETE,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 1,
            is_wide: false,
        };
        let name_size = super::text_size(name)?;
        let words = [name.as_ptr() as usize as u64, 0, 0, 0];
        let named = [Named::Read(name_size), Named::Nothing, Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given & 1 != 0)
    }

    /// Fill a buffer with the name that follows; gives its length in bytes, 0 at the end.
    ///
    /// * `name`: UTF-8, at most 256 bytes, then a NUL.
    /// * `into`: room to fill, of its length in bytes, at most 1048576.
    /// * gives a number, 32 bits.
    pub fn next<C: Caller + ?Sized>(
        caller: &C,
        name: &[u8],
        into: &mut [u8],
    ) -> Result<u32, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_NEXT,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 3,
            is_wide: false,
        };
        let name_size = super::text_size(name)?;
        let words = [name.as_ptr() as usize as u64, into.as_mut_ptr() as usize as u64, into.len() as u64, 0];
        let named = [Named::Read(name_size), Named::Fill(into.len()), Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u32)
    }

    /// The version of an entry; 0 where there is none.
    ///
    /// * `name`: UTF-8, at most 256 bytes, then a NUL.
    /// * gives a number, 64 bits.
    pub fn version<C: Caller + ?Sized>(
        caller: &C,
        name: &[u8],
    ) -> Result<u64, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_VERSION,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 1,
            is_wide: true,
        };
        let name_size = super::text_size(name)?;
        let words = [name.as_ptr() as usize as u64, 0, 0, 0];
        let named = [Named::Read(name_size), Named::Nothing, Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u64)
    }

    /// Keep a value where the entry still has this version; gives its new one.
    ///
    /// * `name`: UTF-8, at most 256 bytes, then a NUL.
    /// * `version`: a number, 64 bits.
    /// * `value`: its length in bytes of it, at most 1048576.
    /// * gives a number, 64 bits.
    pub fn put_if<C: Caller + ?Sized>(
        caller: &C,
        name: &[u8],
        version: u64,
        value: &[u8],
    ) -> Result<u64, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_PUT_IF,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 4,
            is_wide: true,
        };
        let name_size = super::text_size(name)?;
        let words = [name.as_ptr() as usize as u64, version as u64, value.as_ptr() as usize as u64, value.len() as u64];
        let named = [Named::Read(name_size), Named::Nothing, Named::Read(value.len()), Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u64)
    }
}

/// log: request 0x0021.
///
/// Writes the guest's text to the log; the escaped text is its output.
///
/// Let the guest write to the host's log.
///
/// | method | value1 in | value2 in | value1 out | value2 out |
/// |---|---|---|---|---|
/// | 0x0001 DEBUG | address of the text, UTF-8 | its length in bytes | status | bytes taken |
/// | 0x0002 INFO | as above | | | |
/// | 0x0003 WARNING | as above | | | |
/// | 0x0004 ERROR | as above | | | |
///
/// The status is success, or invalid parameters for a text that is too long or not
/// readable. Text below the configured level is taken and dropped: the guest cannot tell.
///
/// Lines go to the logger `vmibridge.guest`, with `vm` and `vcpu` as attributes of the
/// record too. What a guest writes is hostile: every character that is not printable, and
/// every byte that is not UTF-8, becomes a backslash escape, so that it can neither begin a
/// line of its own nor steer the terminal that shows it.
pub mod log {
    use super::{Caller, Error, Method, Named, Response, Word};

    pub const REQUEST: u16 = 0x0021;
    pub const MAGIC: u32 = 0x42494d56;
    pub const METHOD_DEBUG: u16 = 0x0001;
    pub const METHOD_INFO: u16 = 0x0002;
    pub const METHOD_WARNING: u16 = 0x0003;
    pub const METHOD_ERROR: u16 = 0x0004;

    /// Log a text as debug.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn debug<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_DEBUG,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x100)) }
    }

    /// Log a text as info.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn info<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_INFO,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x100)) }
    }

    /// Log a text as a warning.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn warning<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_WARNING,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x100)) }
    }

    /// Log a text as an error.
    ///
    /// It takes and gives four values.
    ///
    /// # Safety
    ///
    /// The host may read and write memory that the values name.
    pub unsafe fn error<C: Caller + ?Sized>(
        caller: &C,
        values: [Word; 4],
    ) -> Result<Response, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_ERROR,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 0,
            is_wide: false,
        };
        unsafe { super::call_plain(caller, &method, values, Some(0x100)) }
    }
}

/// random: request 0x0115.
///
/// Fills buffers with random bytes; how many is its output.
pub mod random {
    use super::{Caller, Error, Method, Named, Response, Word};

    pub const REQUEST: u16 = 0x0115;
    pub const MAGIC: u32 = 0x42494d56;
    pub const METHOD_FILL: u16 = 0x0001;
    pub const FILL_INTO_LIMIT: usize = 1048576;

    /// Fill a buffer with random bytes; gives how many.
    ///
    /// * `into`: room to fill, of its length in bytes, at most 1048576.
    /// * gives a number, 32 bits.
    pub fn fill<C: Caller + ?Sized>(
        caller: &C,
        into: &mut [u8],
    ) -> Result<u32, Error> {
        let method = Method {
            magic: MAGIC,
            request: REQUEST,
            method: METHOD_FILL,
            stamps: [None, None, Some(super::STAMP3), Some(super::STAMP4)],
            words: 2,
            is_wide: false,
        };
        let words = [into.as_mut_ptr() as usize as u64, into.len() as u64, 0, 0];
        let named = [Named::Fill(into.len()), Named::Nothing, Named::Nothing, Named::Nothing];
        // What the words name is borrowed here.
        let given = unsafe { super::call(caller, &method, words, named) }?;
        Ok(given as u32)
    }
}
