/* A stand-in for NVIDIA's libnvidia-ml.so.1, so that GPU code runs on machines without one.
 *
 * Build:  gcc -shared -fPIC -Wl,-soname,libnvidia-ml.so.1 -o DIR/libnvidia-ml.so.1 fake_nvml.c
 *         with -DOLD_DRIVER to leave out what drivers before 510 do not have
 * Use:    LD_LIBRARY_PATH=DIR FAKE_NVML=STATE program
 *
 * STATE is a text file, read again at every call, so that a test can change it at any time.
 * One GPU a line, words KEY=VALUE in any order ("_" in a name is shown as a blank):
 *
 *     uuid=GPU-1 name=Fake_A100 bus=00000000:3B:00.0 total=81920 used=1024 busy=37
 *     temperature=55 fan=30 power=250000 limit=400000 error=0
 *
 * total and used are MiB, power and limit milliwatts. A value that is not given is "not
 * supported" by that GPU. error=N makes every question about the GPU answer with error N.
 * A GPU whose line is gone is lost. A file without GPUs, or no file, is a driver that is
 * not loaded. Numbers of errors and layouts of structures: nvml.h of the CUDA toolkit.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
};
enum { MOST_GPUS = 16, TEXT = 80, NOT_GIVEN = -1, MIB = 1 << 20 };

struct gpu {
    char uuid[TEXT], name[TEXT], bus[TEXT];
    long long total, used, busy, temperature, fan, power, limit, error;
};

/* A handle is one more than a place in here: it names the same GPU whatever becomes of the file. */
static char seen[MOST_GPUS][TEXT];

static void set(struct gpu *gpu, const char *key, const char *value)
{
    struct { const char *key; char *text; } texts[] = {
        {"uuid", gpu->uuid}, {"name", gpu->name}, {"bus", gpu->bus},
    };
    struct { const char *key; long long *number; } numbers[] = {
        {"total", &gpu->total}, {"used", &gpu->used}, {"busy", &gpu->busy},
        {"temperature", &gpu->temperature}, {"fan", &gpu->fan}, {"power", &gpu->power},
        {"limit", &gpu->limit}, {"error", &gpu->error},
    };
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++)
        if (!strcmp(key, texts[i].key))
            snprintf(texts[i].text, TEXT, "%s", value);
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (!strcmp(key, numbers[i].key))
            *numbers[i].number = atoll(value);
}

static int load(struct gpu *gpus)
{
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    char line[1024];
    int count = 0;

    while (file && count < MOST_GPUS && fgets(line, sizeof line, file)) {
        struct gpu gpu = {.total = NOT_GIVEN, .used = NOT_GIVEN, .busy = NOT_GIVEN,
                          .temperature = NOT_GIVEN, .fan = NOT_GIVEN, .power = NOT_GIVEN,
                          .limit = NOT_GIVEN};
        for (char *rest = line, *word; (word = strtok_r(rest, " \n", &rest));) {
            char *value = strchr(word, '=');
            if (value) {
                *value++ = '\0';
                set(&gpu, word, value);
            }
        }
        for (char *c = gpu.name; *c; c++)
            if (*c == '_')
                *c = ' ';
        if (*gpu.uuid)
            gpus[count++] = gpu;
    }
    if (file)
        fclose(file);
    return count;
}

static void *handle_of(const char *uuid)
{
    for (long place = 0; place < MOST_GPUS; place++) {
        if (!*seen[place])
            snprintf(seen[place], TEXT, "%s", uuid);
        if (!strcmp(seen[place], uuid))
            return (void *)(place + 1);
    }
    return NULL;
}

static int find(void *handle, struct gpu *found)
{
    struct gpu gpus[MOST_GPUS];
    long place = (long)handle - 1;
    int count = load(gpus);

    if (place < 0 || place >= MOST_GPUS)
        return INVALID_ARGUMENT;
    for (int i = 0; i < count; i++)
        if (!strcmp(gpus[i].uuid, seen[place])) {
            *found = gpus[i];
            return (int)gpus[i].error;
        }
    return GPU_IS_LOST;
}

static int give_text(void *handle, size_t offset, char *text, unsigned size)
{
    struct gpu gpu;
    int error = find(handle, &gpu);
    if (error)
        return error;
    const char *value = (char *)&gpu + offset;
    if (strlen(value) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(text, value);
    return SUCCESS;
}

static int give_number(void *handle, size_t offset, unsigned *number)
{
    struct gpu gpu;
    int error = find(handle, &gpu);
    if (error)
        return error;
    long long value;
    memcpy(&value, (char *)&gpu + offset, sizeof value);
    if (value == NOT_GIVEN)
        return NOT_SUPPORTED;
    *number = (unsigned)value;
    return SUCCESS;
}

#define FIELD(name) __builtin_offsetof(struct gpu, name)

int nvmlInitWithFlags(unsigned flags)
{
    struct gpu gpus[MOST_GPUS];
    (void)flags;
    return load(gpus) ? SUCCESS : DRIVER_NOT_LOADED;
}

int nvmlShutdown(void) { return SUCCESS; }

int nvmlDeviceGetCount_v2(unsigned *count)
{
    struct gpu gpus[MOST_GPUS];
    *count = (unsigned)load(gpus);
    return *count ? SUCCESS : DRIVER_NOT_LOADED;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle)
{
    struct gpu gpus[MOST_GPUS];
    if (index >= (unsigned)load(gpus))
        return INVALID_ARGUMENT;
    *handle = handle_of(gpus[index].uuid);
    return (int)gpus[index].error;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **handle)
{
    struct gpu gpus[MOST_GPUS];
    int count = load(gpus);
    for (int i = 0; i < count; i++)
        if (!strcmp(gpus[i].uuid, uuid)) {
            *handle = handle_of(uuid);
            return (int)gpus[i].error;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetUUID(void *handle, char *text, unsigned size)
{
    return give_text(handle, FIELD(uuid), text, size);
}

int nvmlDeviceGetName(void *handle, char *text, unsigned size)
{
    return give_text(handle, FIELD(name), text, size);
}

struct pci {
    char legacy_bus[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_text[32];
};

int nvmlDeviceGetPciInfo_v3(void *handle, struct pci *info)
{
    struct gpu gpu;
    int error = find(handle, &gpu);
    if (error)
        return error;
    memset(info, 0, sizeof *info);
    snprintf(info->bus_text, sizeof info->bus_text, "%.31s", gpu.bus);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(void *handle, unsigned long long *info) /* total, free, used */
{
    struct gpu gpu;
    int error = find(handle, &gpu);
    if (error)
        return error;
    info[0] = (unsigned long long)gpu.total * MIB;
    info[1] = (unsigned long long)(gpu.total - gpu.used) * MIB;
    info[2] = (unsigned long long)gpu.used * MIB;
    return SUCCESS;
}

struct utilization { unsigned gpu, memory; };

int nvmlDeviceGetUtilizationRates(void *handle, struct utilization *rates)
{
    rates->memory = 0;
    return give_number(handle, FIELD(busy), &rates->gpu);
}

int nvmlDeviceGetTemperature(void *handle, unsigned sensor, unsigned *degrees)
{
    (void)sensor;
    return give_number(handle, FIELD(temperature), degrees);
}

int nvmlDeviceGetFanSpeed(void *handle, unsigned *percent)
{
    return give_number(handle, FIELD(fan), percent);
}

int nvmlDeviceGetPowerUsage(void *handle, unsigned *milliwatts)
{
    return give_number(handle, FIELD(power), milliwatts);
}

int nvmlDeviceGetEnforcedPowerLimit(void *handle, unsigned *milliwatts)
{
    return give_number(handle, FIELD(limit), milliwatts);
}

#ifndef OLD_DRIVER

struct memory_v2 { unsigned version; unsigned long long total, reserved, free, used; };

int nvmlDeviceGetMemoryInfo_v2(void *handle, struct memory_v2 *info)
{
    unsigned long long v1[3];
    int error = nvmlDeviceGetMemoryInfo(handle, v1);
    if (error)
        return error;
    info->total = v1[0];
    info->reserved = 0;
    info->free = v1[1];
    info->used = v1[2];
    return SUCCESS;
}

struct temperature { unsigned version, sensor; int degrees; };

int nvmlDeviceGetTemperatureV(void *handle, struct temperature *reading)
{
    return give_number(handle, FIELD(temperature), (unsigned *)&reading->degrees);
}

#endif
